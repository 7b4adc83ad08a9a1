"""Who calls ``/worker/v1``: a worker with a credential of its own, or a member of the fleet with the join token."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from queue_schemas import JOIN_TOKEN_HEADER, AuthenticationFailed, CannotStart
from telemetry import get_logger
from telemetry.http.access import is_join_token
from telemetry.http.loopback_access import LoopbackAccess

from .rules import WorkerScope, parse_credentials

_JOIN_TOKEN = JOIN_TOKEN_HEADER.encode()
_UNLIMITED = WorkerScope.unlimited()

log = get_logger(__name__)


class WorkerCredentials:
    """The valid credentials, read again whenever their file changes. Raises ``CannotStart`` if they cannot be read at
    the start; later the old ones stay valid. ``changed`` is called when there are others."""

    def __init__(self, file: str, join_token: str, local: LoopbackAccess, *, guarded: bool) -> None:
        """``local``: who may call where neither credentials nor a join token nor (``guarded``) API keys are set."""
        self.changed: Callable[[], None] = lambda: None
        self._join_token = join_token
        self._local = local
        self._guarded = guarded
        self._path = Path(file) if file else None
        self._stamp = (0, 0)
        self._scopes: Mapping[bytes, WorkerScope] = {}
        if self._path is not None:
            self._load(self._path)

    def scope(self, headers: Mapping[bytes, bytes]) -> WorkerScope:
        """What the caller with these headers (lower-case names) may do. Raises ``AuthenticationFailed``, or where no
        credentials are set ``PermissionRefused``."""
        if is_join_token(self._join_token, headers.get(_JOIN_TOKEN, b"").decode("latin-1")):
            return _UNLIMITED
        if self._path is None and not self._join_token and not self._guarded:
            self._local.check(headers)
            return _UNLIMITED
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = key.strip() if scheme.lower() == b"bearer" else b""
        scope = self._scopes.get(hashlib.sha256(given).digest())
        if scope is None or not given:
            what = "not known here, or not any more" if given else "missing"
            raise AuthenticationFailed(
                f"the worker's credential is {what}: send it as Authorization: Bearer KEY (INFERQ_WORKER_KEY), or the "
                f"join token as {JOIN_TOKEN_HEADER}"
            )
        return scope

    def refresh(self) -> None:
        """Read the file again if it changed."""
        if self._path is None:
            return
        try:
            if _stamp(self._path) != self._stamp:
                self._load(self._path)
                log.info("worker_credentials_read", count=len(self._scopes))
                self.changed()
        except (CannotStart, OSError) as error:
            log.error("worker_credentials_not_read", error=str(error))

    def _load(self, path: Path) -> None:
        try:
            self._stamp = _stamp(path)
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CannotStart(f"the file of worker credentials {path} cannot be read: {error}") from error
        self._scopes = parse_credentials(text, str(path))


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size
