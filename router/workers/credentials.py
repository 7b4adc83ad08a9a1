"""Who calls ``/worker/v1``: a worker with a credential of its own, or a member of the fleet with the join token."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

from queue_schemas import JOIN_TOKEN_HEADER, AuthenticationFailed
from telemetry import get_logger
from telemetry.http.access import is_join_token
from telemetry.http.loopback_access import LoopbackAccess

from ..http.rules import bearer_key
from ..http.watched_file import WatchedFile
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
        self._file = (
            WatchedFile(file, "worker credentials", parse_credentials, failure="worker_credentials_not_read")
            if file
            else None
        )

    def scope(self, headers: Mapping[bytes, bytes]) -> WorkerScope:
        """What the caller with these headers (lower-case names) may do. Raises ``AuthenticationFailed``, or where no
        credentials are set ``PermissionRefused``."""
        if is_join_token(self._join_token, headers.get(_JOIN_TOKEN, b"").decode("latin-1")):
            return _UNLIMITED
        if self._file is None and not self._join_token and not self._guarded:
            self._local.check(headers)
            return _UNLIMITED
        given = bearer_key(headers.get(b"authorization", b"")) or b""
        scope = self._file.value.get(hashlib.sha256(given).digest()) if self._file is not None else None
        if scope is None or not given:
            what = "not known here, or not any more" if given else "missing"
            raise AuthenticationFailed(
                f"the worker's credential is {what}: send it as Authorization: Bearer KEY (INFERQ_WORKER_KEY), or the "
                f"join token as {JOIN_TOKEN_HEADER}"
            )
        return scope

    def refresh(self) -> None:
        """Read the file again if it changed."""
        if self._file is not None and self._file.refresh():
            log.info("worker_credentials_read", count=len(self._file.value))
            self.changed()
