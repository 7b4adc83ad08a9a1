"""Store objects by name, with fsspec: in a local folder, in S3, or in any other file system that fsspec supports.

Names are plain paths below the root. Writes are atomic (:mod:`storage.writing`). All calls block.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from queue_schemas import CannotStart, StoreUnavailable
from telemetry import get_logger

from .failures import ObjectMissing, store_errors
from .settings import StorageSettings
from .writing import SCRATCH, LocalWriter, ObjectWriter, RemoteWriter, make_folder, sync_folder

PIECE_BYTES = 1 << 20
"""Maximum size of one read."""
MARK = ".inferq-store"
"""An empty object at the root of a folder. If it is missing, the folder's disk is not mounted, or it is a new
folder."""
_DELETE_TRIES = 5

log = get_logger(__name__)


class Writer(Protocol):
    """Writes an object piece by piece."""

    def write(self, data: bytes, /) -> object: ...


class ObjectStore:
    """All methods raise ``StoreUnavailable`` if the store cannot be reached or refuses the call, and ``StoreFull`` if
    it has no room."""

    def __init__(self, filesystem: Any, root: str) -> None:
        """``filesystem`` is one of fsspec, ``root`` a path in it."""
        self._files = filesystem
        self._root = root.rstrip("/")
        self._folder = Path(root) if isinstance(filesystem, LocalFileSystem) else None
        self._mark_seen = False

    @classmethod
    def open(cls, settings: StorageSettings) -> ObjectStore:
        """The store that the settings name. Connects to nothing yet. Raises ``CannotStart``."""
        try:
            filesystem, root = fsspec.url_to_fs(settings.url, use_listings_cache=False, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise CannotStart(
                f"[storage] url {settings.url!r} cannot be used: {error}; give a folder, or s3://bucket/prefix with "
                "pip install 'inferq[s3]'"
            ) from error
        return cls(filesystem, root)

    def put(self, name: str, data: bytes, *, private: bool = False) -> None:
        """Write a small object, replacing one of that name. ``private``: in a folder, only its owner may read it."""
        if self._folder is None:
            with store_errors(name):
                self._files.pipe_file(self._path(name), data)
            return
        with self.writer(name, private=private) as writer:
            writer.write(data)

    def put_new(self, name: str, data: bytes) -> bool:
        """Write a small object unless one of that name exists; whether it was written."""
        if self._folder is None:
            with store_errors(name):
                try:
                    self._files.pipe_file(self._path(name), data, mode="create")
                except FileExistsError:
                    return False
                return True
        self._check_mark(writing=True)
        writer = LocalWriter(self._folder, name, private=False)
        try:
            writer.write(data)
            return writer.commit(new=True)
        finally:
            writer.discard()

    def begin(self, name: str, *, private: bool = False) -> ObjectWriter:
        """Write an object piece by piece; the caller must commit or discard it."""
        if self._folder is not None:
            self._check_mark(writing=True)
            return LocalWriter(self._folder, name, private=private)
        return RemoteWriter(self._files, self._path(name), name)

    @contextmanager
    def writer(self, name: str, *, private: bool = False) -> Iterator[Writer]:
        """Write an object piece by piece. It appears at the end of the block, unless the block raises."""
        writer = self.begin(name, private=private)
        try:
            yield writer
        except BaseException:
            writer.discard()
            raise
        writer.commit()

    def get(self, name: str) -> bytes | None:
        """A small object; None if it does not exist."""
        try:
            with store_errors(name, reading=True):
                return bytes(self._files.cat_file(self._path(name)))
        except ObjectMissing:
            self._check_mark()
            return None

    def get_many(self, names: Sequence[str]) -> list[bytes | None]:
        """Small objects, None for those that do not exist; concurrently where each takes a round trip."""
        if self._folder is not None or not names:
            return [self.get(name) for name in names]
        with store_errors(names[0]):
            found = self._files.cat([self._path(name) for name in names], on_error="return")
        return [self._one_of(found, name) for name in names]

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end`` (exclusive) of an object. Raises ``ObjectMissing``."""
        try:
            with store_errors(name, reading=True):
                return bytes(self._files.cat_file(self._path(name), start=start, end=end))
        except ObjectMissing:
            self._check_mark()
            raise

    def names(self, below: str) -> list[str]:
        """The last parts of the names directly below ``below``, sorted, folders included."""
        try:
            with store_errors(below, reading=True):
                if self._folder is not None:
                    found = os.listdir(self._path(below))  # noqa: PTH208 - names only: there may be very many
                else:
                    found = self._files.ls(self._path(below), detail=False)
        except ObjectMissing:
            self._check_mark()
            return []
        names = {str(path).rstrip("/").rpartition("/")[2] for path in found}
        return sorted(names - {MARK if self._folder is not None else PurePosixPath(below).name})

    def sizes(self, below: str) -> dict[str, int]:
        """The size in bytes of every object below ``below``, at any depth, by its full name."""
        with store_errors(below):
            found = self._files.find(self._path(below), detail=True)
        if not found:
            self._check_mark()
        start = len(self._root) + 1
        sizes = {str(path)[start:]: int(facts["size"]) for path, facts in found.items()}
        sizes.pop(MARK, None)
        return sizes

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects. Missing ones are ignored."""
        folders = set()
        for name in names:
            try:
                with store_errors(name, reading=True):
                    self._files.rm_file(self._path(name))
            except ObjectMissing:
                continue
            if self._folder is not None:
                folders.add((self._folder / name).parent)
        for folder in folders:
            self._sync(folder)

    def delete_below(self, folder: str) -> None:
        """Remove ``folder`` and everything below it, even while others write there."""
        for left in reversed(range(_DELETE_TRIES)):
            try:
                with store_errors(folder, reading=True):
                    self._files.rm(self._path(folder), recursive=True)
            except ObjectMissing:
                log.debug(
                    "store_folder_missing", folder=folder
                )  # the folder, or something in it, was removed meanwhile
            except StoreUnavailable:
                if self._folder is None or not left:
                    raise
            if self._folder is None or not (self._folder / folder).exists():
                break
        else:
            raise StoreUnavailable(
                "the file store cannot be used now (others write to the folder being removed); try again"
            )
        if self._folder is not None:
            self._sync((self._folder / folder).parent)

    def clear_scratch(self, before_s: float) -> int:
        """Remove half-written objects of processes that died, untouched since that Unix time, from a folder; how many.

        In an object store a lifecycle rule of the bucket does so for incomplete multipart uploads.
        """
        cleared = 0
        if self._folder is None or not (self._folder / SCRATCH).is_dir():
            return cleared
        for path in (self._folder / SCRATCH).iterdir():
            try:
                with store_errors(path.name, reading=True):
                    if path.stat().st_mtime < before_s:
                        path.unlink()
                        cleared += 1
            except ObjectMissing:
                continue  # it was finished meanwhile
        return cleared

    def check(self) -> None:
        """Write, read and remove an object. Raises if the store cannot be used."""
        name = f"{SCRATCH}-check-{secrets.token_hex(6)}"
        self.put(name, b"inferq")
        if self.get(name) != b"inferq":
            raise StoreUnavailable("the file store does not return what was written to it; check its URL")
        self.delete([name])

    def _check_mark(self, *, writing: bool = False) -> None:
        """Raise ``StoreUnavailable`` if the folder's disk is not mounted any more.

        An unmounted folder must not look empty, nor be created again: called when an object is missing, and before a
        write.
        """
        if self._folder is None:
            return
        mark = self._folder / MARK
        with store_errors(MARK):
            if mark.exists():
                self._mark_seen = True
            elif self._mark_seen:
                raise StoreUnavailable("the file store's folder is missing: is its disk mounted?")
            elif writing:
                make_folder(self._folder, self._folder)
                mark.touch(0o660)
                sync_folder(self._folder)
                self._mark_seen = True

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _one_of(self, found: dict[str, Any], name: str) -> bytes | None:
        value = found.get(self._files._strip_protocol(self._path(name)))
        try:
            with store_errors(name, reading=True):
                if isinstance(value, Exception):
                    raise value
        except ObjectMissing:
            return None
        return None if value is None else bytes(value)

    def _sync(self, folder: Path) -> None:
        try:
            with store_errors(folder.name, reading=True):
                sync_folder(folder)
        except ObjectMissing:
            return  # removed meanwhile, with everything in it
