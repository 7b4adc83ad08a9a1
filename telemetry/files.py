"""Files of every role: paths as people write them, logs to append to, and small private files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from queue_schemas import CannotStart

_FILE_MODE, _FOLDER_MODE = 0o660, 0o770
"""Before the umask: engines write prompts, and we write addresses, nobody else's to read. A group may collect logs."""


def absolute_path(path: Path | str) -> Path:
    """``path`` with ``~`` as the user's home. Raises ``CannotStart`` for a user who has none."""
    try:
        return Path(path).expanduser().absolute()
    except FileNotFoundError as error:
        raise CannotStart(f"{path} cannot be found: the folder that this process was started in is gone") from error
    except RuntimeError as error:
        raise CannotStart(f"{path} begins with ~, but this user has no home directory: write it in full") from error


def open_log(path: Path) -> BinaryIO:
    """``path``, to append to without a buffer, made with its folder if need be. Raises ``OSError``."""
    path.parent.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, _FILE_MODE)
    return os.fdopen(descriptor, "ab", buffering=0)


def write_private(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``, readable by the owner only, atomically. Raises ``OSError``."""
    draft = path.with_name(f".{path.name}.new")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:  # noqa: PTH123 - a mode
        file.write(text)
    draft.replace(path)
