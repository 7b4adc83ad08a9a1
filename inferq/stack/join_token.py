"""The join token of a stack whose Router asks for API keys and whose user set none: made once, kept in its folder."""

from __future__ import annotations

import os
import secrets
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


def kept_join_token(data_dir: Path) -> str:
    """The token in ``data_dir``, made at the first call, readable by its owner only. Raises ``CannotStart``."""
    file = data_dir / TOKEN_FILE
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            token = file.read_text("ascii").strip()
            if not token:
                raise CannotStart(
                    f"the join token in {file} is empty: remove the file, or set INFERQ_JOIN_TOKEN"
                ) from None
            return token
        token = secrets.token_urlsafe(32)
        with os.fdopen(descriptor, "w") as draft:
            draft.write(f"{token}\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CannotStart(f"the join token in {file} cannot be used ({error}): set INFERQ_JOIN_TOKEN") from error
    return token
