"""Objects by name, over fsspec: a local folder, S3, or whatever else fsspec knows.

Names are plain paths below the root. An object appears whole or not at all: in a folder it is written beside, brought
to the disk and renamed; object stores do so by themselves. All calls block.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from queue_schemas import CannotStart, InferqError, StoreFull, StoreUnavailable

from .settings import StorageSettings

PIECE_BYTES = 1 << 20
"""How much is read or copied at a time."""
_SCRATCH = ".writing"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_Answer = TypeVar("_Answer")


class ObjectMissing(Exception):
    """There is no such object; the message is its name."""


class Writer(Protocol):
    """What an object is written with, piece by piece."""

    def write(self, data: bytes, /) -> object: ...


class ObjectStore:
    """All methods raise ``StoreUnavailable`` when the store cannot be reached or refuses us, ``StoreFull`` when there
    is no room."""

    def __init__(self, filesystem: Any, root: str) -> None:
        """``filesystem`` is fsspec's; ``root`` a path in it."""
        self._files = filesystem
        self._root = root.rstrip("/")
        self._folder = Path(root) if isinstance(filesystem, LocalFileSystem) else None

    @classmethod
    def open(cls, settings: StorageSettings) -> ObjectStore:
        """The store that the settings name. Reaches for nothing yet. Raises ``CannotStart``."""
        try:
            filesystem, root = fsspec.url_to_fs(settings.url, use_listings_cache=False, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise CannotStart(
                f"[storage] url {settings.url!r} cannot be used: {error}; give a folder, or s3://bucket/prefix with "
                "pip install 'inferq[s3]'"
            ) from error
        return cls(filesystem, root)

    def put(self, name: str, data: bytes, *, private: bool = False) -> None:
        """Write a small object, in place of any of that name. ``private``: in a folder, only its owner may read it."""
        with self.writer(name, private=private) as writer:
            writer.write(data)

    @contextmanager
    def writer(self, name: str, *, private: bool = False) -> Iterator[Writer]:
        """Write an object piece by piece. It is there once the block is left; left by an error, nothing is."""
        if self._folder is not None:
            with _errors(), _local_writer(self._folder, self._folder / name, private) as file:
                yield file
            return
        with _errors():
            file = self._files.open(self._path(name), "wb", autocommit=False)
            try:
                yield file
                file.close()
            except BaseException:
                file.discard()
                raise
            file.commit()

    def get(self, name: str) -> bytes | None:
        """A small object; None if there is none."""
        try:
            return _asked(lambda: bytes(self._files.cat_file(self._path(name))))
        except ObjectMissing:
            return None

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end`` (exclusive) of an object. Raises ``ObjectMissing``."""
        return _asked(lambda: bytes(self._files.cat_file(self._path(name), start=start, end=end)))

    @contextmanager
    def reader(self, name: str, start: int = 0) -> Iterator[BinaryIO]:
        """Read an object from ``start`` on. Raises ``ObjectMissing``."""
        file = _asked(lambda: self._files.open(self._path(name), "rb"))
        with _errors(), file:
            if start:
                file.seek(start)
            yield file

    def names(self, below: str) -> list[str]:
        """The last parts of the names directly below ``below``, sorted; folders count as names."""
        try:
            found = _asked(lambda: self._files.ls(self._path(below), detail=False))
        except ObjectMissing:
            return []
        names = {PurePosixPath(str(path)).name for path in found}
        return sorted(names - {PurePosixPath(below).name} if self._folder is None else names)

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; those that are not there are none to remove."""
        for name in names:
            try:
                _asked(partial(self._files.rm_file, self._path(name)))
            except ObjectMissing:
                continue

    def delete_below(self, folder: str) -> None:
        """Remove everything below ``folder``, and it."""
        try:
            _asked(lambda: self._files.rm(self._path(folder), recursive=True))
        except ObjectMissing:
            return

    def check(self) -> None:
        """Write, read and remove an object. Raises what keeps the store from being used."""
        name = f"{_SCRATCH}-check-{secrets.token_hex(6)}"
        self.put(name, b"inferq")
        if self.get(name) != b"inferq":
            raise StoreUnavailable("the file store does not give back what was written to it; check its URL")
        self.delete([name])

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


@contextmanager
def _local_writer(root: Path, target: Path, private: bool) -> Iterator[BinaryIO]:
    scratch = root / _SCRATCH / secrets.token_hex(12)
    scratch.parent.mkdir(parents=True, exist_ok=True)
    try:
        with os.fdopen(
            os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666), "wb"
        ) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch.replace(target)
        _sync_folder(target.parent)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _asked(call: Callable[[], _Answer]) -> _Answer:
    with _errors():
        try:
            return call()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ObjectMissing(str(error)) from error


@contextmanager
def _errors() -> Iterator[None]:
    """Whatever a store says, as an error of ours."""
    try:
        yield
    except (InferqError, ObjectMissing):
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise StoreFull("the file store has no room left: free some, or delete files") from error
        raise StoreUnavailable(f"the file store cannot be used now: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
