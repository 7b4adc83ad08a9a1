"""Write one object atomically: it appears once it is committed.

In a folder: write to a scratch file, fsync it, rename it, fsync the folder. Object stores make an object visible when
its last part has arrived.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from fsspec.spec import AbstractBufferedFile

from .failures import store_errors

SCRATCH = ".writing"
"""Folder of the scratch files."""
REMOTE_PART_BYTES = 8 << 20
"""Size of an upload part, held in memory. An object store takes up to 10,000 parts: 80 GB."""
_SYNC_BYTES = 64 << 20
"""A large object is fsynced in steps, so that the last one does not take minutes."""
_FILE_MODE, _PRIVATE_MODE, _FOLDER_MODE = 0o660, 0o600, 0o770
"""Before the umask. Uploads of clients are not readable by other users."""


class ObjectWriter(Protocol):
    """Call ``write`` repeatedly, then ``commit``. ``discard`` leaves nothing before a commit, and does nothing after
    it.
    Methods raise the errors of :class:`storage.ObjectStore`."""

    def write(self, data: bytes, /) -> object: ...

    def commit(self) -> object: ...

    def discard(self) -> None: ...


class LocalWriter:
    """Writes ``root/name`` in a local folder."""

    def __init__(self, root: Path, name: str, *, private: bool) -> None:
        self._root = root
        self._name = name
        self._scratch = root / SCRATCH / secrets.token_hex(12)
        self._unsynced = 0
        with store_errors(name):
            make_folder(self._scratch.parent, root)
            mode = _PRIVATE_MODE if private else _FILE_MODE
            self._descriptor: int | None = os.open(self._scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)

    def write(self, data: bytes, /) -> None:
        with store_errors(self._name):
            view = memoryview(data)
            while view:
                view = view[os.write(self._open(), view) :]
            self._unsynced += len(data)
            if self._unsynced >= _SYNC_BYTES:
                os.fsync(self._open())
                self._unsynced = 0

    def commit(self, *, new: bool = False) -> bool:
        """With ``new``, do not replace an object of that name. Whether the object was written."""
        try:
            with store_errors(self._name):
                os.fsync(self._open())
                self._close()
                target = self._root / self._name
                make_folder(target.parent, self._root)
                if not new:
                    self._scratch.replace(target)
                else:
                    try:
                        os.link(self._scratch, target)
                    except FileExistsError:
                        return False
                sync_folder(target.parent)
                return True
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        with store_errors(self._name):
            try:
                self._close()
            finally:
                self._scratch.unlink(missing_ok=True)

    def _open(self) -> int:
        if self._descriptor is None:
            raise OSError("written to after it was closed")
        return self._descriptor

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class RemoteWriter:
    """Writes to any other file system of fsspec; ``path`` is the full path."""

    def __init__(self, filesystem: Any, path: str, name: str) -> None:
        self._name = name
        self._ended = False
        with store_errors(name):
            self._file = filesystem.open(path, "wb", block_size=REMOTE_PART_BYTES, autocommit=False)

    def write(self, data: bytes, /) -> None:
        with store_errors(self._name):
            self._file.write(data)

    def commit(self) -> None:
        try:
            with store_errors(self._name):
                self._file.close()
                self._file.commit()
                self._ended = True
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        if not self._ended:
            self._ended = True
            with store_errors(self._name):
                self._file.discard()
            if isinstance(self._file, AbstractBufferedFile):
                self._file.closed = True  # or it would write its buffer when it is garbage-collected


def make_folder(folder: Path, root: Path) -> None:
    """Make a folder and its parents, and fsync each: a rename into a folder that a crash loses would be lost."""
    if folder.is_dir():
        return
    if folder != root:
        make_folder(folder.parent, root)
    with suppress(FileExistsError):  # another process made it meanwhile
        folder.mkdir(mode=_FOLDER_MODE, parents=folder == root)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make creations, renames and removals in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
