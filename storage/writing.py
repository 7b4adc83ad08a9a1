"""Writing one object: it is there whole once it is committed, or not at all.

In a folder it is written beside, brought to the disk, renamed, and the folder brought to the disk; object stores show
an object once its last part has come.
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
"""Where in a folder objects are written before they are renamed."""
REMOTE_PART_BYTES = 8 << 20
"""How much of an object is held in memory before it goes to an object store. 10,000 such parts make 80 GB."""
_SYNC_BYTES = 64 << 20
"""A long object is brought to the disk in steps, so that the last one does not take minutes."""
_FILE_MODE, _PRIVATE_MODE, _FOLDER_MODE = 0o660, 0o600, 0o770
"""Before the umask: what clients upload is nobody else's."""


class ObjectWriter(Protocol):
    """``write`` as often as wanted, then ``commit``. ``discard`` at any time: before a commit nothing stays; after it
    nothing happens. Methods raise as those of the store."""

    def write(self, data: bytes, /) -> object: ...

    def commit(self) -> object: ...

    def discard(self) -> None: ...


class LocalWriter:
    """In the folder ``root``, for ``root/name``."""

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
        """``new``: unless there is an object of that name, whose place it does not take then. Whether it is there."""
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
            raise OSError("written to after its end")
        return self._descriptor

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class RemoteWriter:
    """In whatever else fsspec knows; ``path`` is its full one."""

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
                self._file.closed = True  # or it would write what it holds when it is collected


def make_folder(folder: Path, root: Path) -> None:
    """Make a folder and what is above it, each brought to the disk: a rename into one that a crash forgets is lost."""
    if folder.is_dir():
        return
    if folder != root:
        make_folder(folder.parent, root)
    with suppress(FileExistsError):  # made by another in between
        folder.mkdir(mode=_FOLDER_MODE, parents=folder == root)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Bring to the disk what was made, renamed and removed in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
