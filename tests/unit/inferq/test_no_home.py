"""Users without a home directory and without a name, as containers often have."""

from __future__ import annotations

import pwd
import sys
from pathlib import Path

import pytest

from inferq.commands import roles
from inferq.vllm_setup import SetupFailed, find_default_model, find_vllm
from inferq.vllm_setup.cache import cache_dir
from queue_schemas import CannotStart
from telemetry.files import absolute_path


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No HOME, no cache folder named, and a user whom the password file does not know."""

    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME", "INFERQ_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))


def test_a_worker_that_needs_no_cache_asks_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """[G3] Nothing can have been prepared, which is no trouble for a simulated or attached engine."""
    assert find_vllm() is None
    assert find_default_model() is None
    monkeypatch.setattr("worker.service.main", len)
    assert roles.run_worker(["--engine", "sim"]) == 2


def test_what_needs_a_cache_says_how_to_name_one() -> None:
    """[G3] A sentence instead of a traceback."""
    with pytest.raises(SetupFailed, match="INFERQ_CACHE_DIR, or set HOME"):
        cache_dir()
    with pytest.raises(CannotStart, match="no home directory: write it in full"):
        absolute_path("~/data")
    assert absolute_path("/data") == Path("/data")
