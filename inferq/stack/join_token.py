"""Create and keep the join token of an `inferq up` whose Router requires API keys and whose user set no token."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from manager.settings import ManagerSettings
from queue_schemas import CannotStart
from router.settings import RouterSettings
from worker.settings import WorkerSettings

TOKEN_FILE = "join-token"  # noqa: S105 - a file's name


def needs_join_token() -> bool:
    """Whether the settings ask for API keys and give no role a join token: workers could not join by the Router."""
    router = RouterSettings.load()
    if not (router.api_keys or router.api_keys_file):
        return False
    # A worker's settings want more to be valid than its token does.
    roles = (router.join_token, ManagerSettings.load().join_token, WorkerSettings.load(engine="sim").join_token)
    return not any(token.get_secret_value() for token in roles)


def load_or_create_join_token(data_dir: Path) -> str:
    """The token in ``data_dir``, made at the first call, readable by its owner only. Raises ``CannotStart``."""
    file = data_dir / TOKEN_FILE
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            _create(file, secrets.token_urlsafe(32))
        token = file.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CannotStart(f"the join token in {file} cannot be used ({error}): set INFERQ_JOIN_TOKEN") from error
    if not token:
        raise CannotStart(f"the join token in {file} is empty: remove the file, or set INFERQ_JOIN_TOKEN")
    return token


def _create(file: Path, token: str) -> None:
    """Write the file beside its place, then link it: another process sees a whole token or none, and the first wins."""
    draft = file.with_name(f".{TOKEN_FILE}.{secrets.token_hex(6)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as writing:
            writing.write(f"{token}\n")
        with suppress(FileExistsError):
            os.link(draft, file)
    finally:
        draft.unlink(missing_ok=True)
