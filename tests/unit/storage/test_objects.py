"""Objects: whole or not at all, in a folder and in what stands for an object store."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from queue_schemas import CannotStart, StoreFull, StoreUnavailable
from storage import ObjectMissing, ObjectStore, StorageSettings
from storage import writing as module


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    if request.param == "folder":
        yield ObjectStore.open(StorageSettings(url=str(tmp_path / "store")))
        return
    yield ObjectStore.open(StorageSettings(url="memory://inferq-test"))
    fsspec.filesystem("memory").store.clear()


def test_what_is_put_is_read_back(store: ObjectStore) -> None:
    """An object is read whole and in part; a missing one is reported."""
    store.put("a/b/one", b"0123456789")
    assert store.get("a/b/one") == b"0123456789"
    assert store.read("a/b/one", 2, 5) == b"234"
    assert store.get("a/b/two") is None
    with pytest.raises(ObjectMissing):
        store.read("a/b/two", 0, 1)


def test_an_object_is_replaced_whole(store: ObjectStore) -> None:
    """A second write takes the place of the first."""
    store.put("a/one", b"long before")
    store.put("a/one", b"now")
    assert store.get("a/one") == b"now"


def test_what_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    """A write that ends in an error leaves no object, and the one before stays."""
    store = ObjectStore.open(StorageSettings(url=str(tmp_path)))
    store.put("a/one", b"before")
    for name in ("a/one", "a/two"):
        with pytest.raises(ZeroDivisionError), store.writer(name) as writer:
            writer.write(b"half")
            raise ZeroDivisionError
    assert store.get("a/one") == b"before"
    assert store.get("a/two") is None
    assert store.names("a") == ["one"]


def test_names_are_listed_and_removed(store: ObjectStore) -> None:
    """Names come sorted, folders among them; of what is not there, none. Removing is repeatable."""
    for name in ("x/b", "x/a", "x/c/deep"):
        store.put(name, b"1")
    assert store.names("x") == ["a", "b", "c"]
    assert store.names("nothing") == []
    store.delete(["x/a", "x/a", "x/never"])
    store.delete_below("x/c")
    store.delete_below("x/c")
    assert store.names("x") == ["b"]


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), OSError(errno.ENOTEMPTY, "Directory not empty")])
def test_a_folder_goes_whole_whoever_works_in_it_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    """What another takes away, or adds, while a folder is removed leaves nothing else of it behind."""
    store = ObjectStore.open(StorageSettings(url=str(tmp_path)))
    store.put("x/secrets", b"1")
    remove, failures = LocalFileSystem.rm, [error]

    def raced(self: LocalFileSystem, path: str, recursive: bool) -> None:
        if failures:
            raise failures.pop()
        remove(self, path, recursive=recursive)

    monkeypatch.setattr(LocalFileSystem, "rm", raced)
    store.delete_below("x")
    assert store.names("") == [".writing"]


def test_a_full_disk_and_a_refusing_one_have_words_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No room is one error, anything else another; both say what to do."""
    store = ObjectStore.open(StorageSettings(url=str(tmp_path)))

    def fail(number: int) -> Any:
        def fsync(_: int) -> None:
            raise OSError(number, "as ordered")

        return fsync

    monkeypatch.setattr(module.os, "fsync", fail(errno.ENOSPC))
    with pytest.raises(StoreFull, match="no room"):
        store.put("a", b"1")
    monkeypatch.setattr(module.os, "fsync", fail(errno.EIO))
    with pytest.raises(StoreUnavailable, match="as ordered"):
        store.put("a", b"1")
    assert store.names("") in ([".writing"], [])


def test_what_is_committed_was_brought_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes before the name, then every folder that has a new name in it, up to the one that was there."""
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        order.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        order.append("renamed")
        return replace(path, target)

    monkeypatch.setattr(module.os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    store = ObjectStore.open(StorageSettings(url=str(tmp_path / "store")))
    with store.writer("a/b/one") as writer:
        writer.write(b"1" * 10)
    at = order.index("renamed")
    assert len(order[at - 3]) == 24  # the object's bytes, under its name for the time being
    assert order[at - 2 : at] == ["store", "a"]
    assert order[at + 1 :] == ["b"]
    assert tmp_path.name in order[:at]


def test_a_long_object_is_brought_to_the_disk_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that its end does not take minutes."""
    monkeypatch.setattr(module, "_SYNC_BYTES", 10)
    synced: list[int] = []
    monkeypatch.setattr(module.os, "fsync", synced.append)
    store = ObjectStore.open(StorageSettings(url=str(tmp_path)))
    writer = store.begin("one")
    before = len(synced)
    for _ in range(4):
        writer.write(b"12345")
    assert len(synced) == before + 2
    writer.discard()


def test_what_a_store_says_of_its_hosts_is_for_the_log() -> None:
    """A client is told the kind of error; an error of who writes or reads is passed on as it is."""

    class Broken(MemoryFileSystem):
        def cat_file(self, path: str, **_: Any) -> bytes:
            raise RuntimeError("http://minio.internal:9000 refused key AKIA")

    store = ObjectStore(Broken(), "/x")
    with pytest.raises(StoreUnavailable, match="RuntimeError") as told:
        store.get("one")
    assert "minio" not in told.value.message


def test_a_url_that_cannot_be_used_is_reported_at_once() -> None:
    """An unknown scheme is refused with what to give instead."""
    with pytest.raises(CannotStart, match="give a folder"):
        ObjectStore.open(StorageSettings(url="gopher://somewhere/else"))


def test_a_folder_that_is_away_is_no_empty_store(tmp_path: Path) -> None:
    """A disk that is not mounted any more: what was there does not seem gone, and nothing is written in its place. Once
    it is back, all is as before."""
    folder = tmp_path / "store"
    store = ObjectStore.open(StorageSettings(url=str(folder)))
    store.put("a/b", b"1")
    for instead in (False, True):
        folder.rename(tmp_path / "away")
        if instead:
            folder.mkdir()
        calls: list[Callable[[], object]] = [
            lambda: store.get("a/b"),
            lambda: store.read("a/b", 0, 1),
            lambda: store.names("a"),
            lambda: store.sizes("a"),
            lambda: store.put("a/c", b"2"),
        ]
        for call in calls:
            with pytest.raises(StoreUnavailable, match="is its disk mounted"):
                call()
        if instead:
            folder.rmdir()
        (tmp_path / "away").rename(folder)
        assert store.get("a/b") == b"1"
        assert store.get("a/c") is None
