"""Which adapters a folder has."""

from __future__ import annotations

from pathlib import Path

import pytest

from queue_schemas import CannotStart
from queue_schemas.fleet.adapters import MAX_ADAPTER_NAMES_BYTES, MAX_ADAPTERS
from tests.support.adapters import make_adapter, make_adapters
from worker.engines import adapter_folder as folder_module
from worker.engines.adapter_folder import AdapterFolder


def test_each_sub_folder_with_a_configuration_is_an_adapter(tmp_path: Path) -> None:
    """Not files, other folders, what cannot be a model's name, or is the name of the engine's model."""
    make_adapters(tmp_path, ["x", "y z", "base", "a\nb"])
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    found = AdapterFolder(tmp_path, 2, taken={"base"})
    assert found.names == {"x", "y z"}
    assert found.path_of("x") == str(tmp_path / "x")
    assert found.room == 2


def test_a_link_to_a_folder_is_one(tmp_path: Path) -> None:
    """As model caches have them."""
    target = make_adapter(tmp_path / "elsewhere", "blob")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "x").symlink_to(target)
    assert AdapterFolder(tmp_path / "adapters", 1).names == {"x"}


def test_what_comes_later_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what went; a folder that cannot be read now, or has too many now, changes nothing."""
    found = AdapterFolder(make_adapters(tmp_path / "adapters", ["x"]), 1)
    assert not found.scan()
    make_adapter(tmp_path / "adapters", "y")
    assert found.scan()
    assert found.names == {"x", "y"}
    monkeypatch.setattr(folder_module, "MAX_ADAPTERS", 2)
    make_adapter(tmp_path / "adapters", "z")
    assert not found.scan()
    assert found.names == {"x", "y"}
    (tmp_path / "adapters").rename(tmp_path / "away")
    assert not found.scan()
    assert found.names == {"x", "y"}


def test_a_folder_that_cannot_be_used_keeps_the_worker_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is not there, with too many adapters, or with too long names of them."""
    with pytest.raises(CannotStart, match=r"--adapters-dir .*nowhere cannot be read: No such file"):
        AdapterFolder(tmp_path / "nowhere", 1)
    make_adapters(tmp_path, ["x", "y", "z"])
    for limit in ("MAX_ADAPTERS", "MAX_ADAPTER_NAMES_BYTES"):
        with monkeypatch.context() as patched:
            patched.setattr(folder_module, limit, 2)
            with pytest.raises(CannotStart, match="has 3 adapters with 3 bytes of names"):
                AdapterFolder(tmp_path, 1)
    assert MAX_ADAPTERS >= 1_000
    assert MAX_ADAPTER_NAMES_BYTES >= 1_000 * 64
