"""API keys, hashed: read from the settings and from a file, again whenever the file changes."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request

from queue_schemas import Tenant
from telemetry import get_logger
from telemetry.http.loopback_access import LoopbackAccess

from .rules import KeyRing, authenticate, parse_keys
from .watched_file import WatchedFile

DEFAULT_TENANT = Tenant("default")
"""The tenant of all requests to a Router without keys."""

log = get_logger(__name__)


class ApiKeys:
    """The valid keys. Raises ``CannotStart`` if they cannot be read at the start; later the old ones stay valid."""

    def __init__(self, given: str, file: str, local: LoopbackAccess | None = None) -> None:
        """``local``: who may call where no keys are required."""
        self._local = local or LoopbackAccess()
        self._given = parse_keys(given, "the setting api_keys")
        self._file = WatchedFile(file, "API keys", parse_keys, failure="api_keys_not_read") if file else None
        self._ring: KeyRing = self._merged()

    @property
    def required(self) -> bool:
        """Whether requests need a key. A file without keys lets nobody in."""
        return bool(self._given) or self._file is not None

    def tenant(self, headers: Mapping[bytes, bytes]) -> Tenant:
        """The tenant of the request with these headers. Raises ``AuthenticationFailed``, or without keys
        ``PermissionRefused``."""
        if not self.required:
            self._local.check(headers)
            return DEFAULT_TENANT
        return authenticate(self._ring, headers.get(b"authorization", b""), headers.get(b"x-api-key", b""))

    def caller(self, request: Request) -> Tenant:
        """The same for a Starlette request."""
        return self.tenant(dict(request.scope["headers"]))

    def refresh(self) -> None:
        """Read the file again if it changed."""
        if self._file is not None and self._file.refresh():
            self._ring = self._merged()
            log.info("api_keys_read", count=len(self._ring))

    def _merged(self) -> KeyRing:
        return self._given if self._file is None else self._given | self._file.value
