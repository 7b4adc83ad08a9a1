"""Resolve paths as people write them, with ``~`` and relative to the working directory."""

from __future__ import annotations

from pathlib import Path

from queue_schemas import CannotStart


def absolute_path(path: Path | str) -> Path:
    """``path`` with ``~`` as the user's home. Raises ``CannotStart`` for a user who has none."""
    try:
        return Path(path).expanduser().absolute()
    except FileNotFoundError as error:
        raise CannotStart(f"{path} cannot be found: the folder that this process was started in is gone") from error
    except RuntimeError as error:
        raise CannotStart(f"{path} begins with ~, but this user has no home directory: write it in full") from error
