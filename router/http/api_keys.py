"""API keys, hashed: read from the settings and from a file, again whenever the file changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from starlette.requests import Request

from queue_schemas import CannotStart, Tenant
from telemetry import get_logger
from telemetry.http.loopback_access import LoopbackAccess

from .rules import KeyRing, authenticate, parse_keys

DEFAULT_TENANT = Tenant("default")
"""The tenant of all requests to a Router without keys."""

log = get_logger(__name__)


class ApiKeys:
    """The valid keys. Raises ``CannotStart`` if they cannot be read at the start; later the old ones stay valid."""

    def __init__(self, given: str, file: str, local: LoopbackAccess | None = None) -> None:
        """``local``: who may call where no keys are required."""
        self._local = local or LoopbackAccess()
        self._given = parse_keys(given, "the setting api_keys")
        self._path = Path(file) if file else None
        self._stamp = (0, 0)
        self._ring: KeyRing = self._given
        if self._path is not None:
            self._load(self._path)

    @property
    def required(self) -> bool:
        """Whether requests need a key. A file without keys lets nobody in."""
        return bool(self._given) or self._path is not None

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
        if self._path is None:
            return
        try:
            if _stamp(self._path) != self._stamp:
                self._load(self._path)
                log.info("api_keys_read", count=len(self._ring))
        except (CannotStart, OSError) as error:
            log.error("api_keys_not_read", error=str(error))

    def _load(self, path: Path) -> None:
        try:
            self._stamp = _stamp(path)
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CannotStart(f"the file of API keys {path} cannot be read: {error}") from error
        self._ring = self._given | parse_keys(text, str(path))


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size
