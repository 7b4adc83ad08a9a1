"""Access to services without credentials: programs that address a loopback name, and no web page of another origin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

from queue_schemas import PermissionRefused
from queue_schemas.addresses import is_loopback
from queue_schemas.errors import UnsupportedMediaType

_JSON = b"application/json"
_CORS_SAFELISTED_TYPES = frozenset({b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data"})
"""What a page may send to any site (Fetch standard, CORS-safelisted)."""
_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_MAX_HOST = 300


@dataclass(frozen=True, slots=True)
class LoopbackAccess:
    """Decides who may call where no credential is configured.

    The Host header defeats DNS rebinding, where a page's own name is made to resolve to 127.0.0.1; the Origin header
    names the page that sends a cross-site request. ``any_host``: any client that reaches the port may call it by any
    name (``--insecure``). ``origins``: web origins that may call as well; ``*``: any.
    """

    any_host: bool = False
    origins: frozenset[str] = frozenset()

    @classmethod
    def of(cls, host: str, *, insecure: bool, origins: Iterable[str] = ()) -> Self:
        """The rule of a service that listens on ``host``. ``insecure`` opens what other machines reach to them."""
        return cls(insecure and not is_loopback(host), frozenset(origins))

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """Raises ``PermissionRefused`` for the headers (lower-case names) of a request that is not let in."""
        host, origin = headers.get(b"host", b""), headers.get(b"origin")
        if not self.any_host and host and not (len(host) <= _MAX_HOST and is_loopback_host(host)):
            raise PermissionRefused(
                "without credentials this service answers to loopback names only, such as http://127.0.0.1 or "
                "http://localhost: call it by one, or configure API keys and a join token (docs/security.md)"
            )
        if origin is not None and not self._is_known(origin, host):
            raise PermissionRefused(
                "without credentials this service answers no web page of another origin: allow the origin, or "
                "configure API keys and a join token (docs/security.md)"
            )

    def _is_known(self, origin: bytes, host: bytes) -> bool:
        _, _, authority = origin.partition(b"://")
        own = bool(host) and authority.lower() == host.lower()
        return own or origin.decode("latin-1") in self.origins or "*" in self.origins


@lru_cache(256)
def is_loopback_host(host: bytes) -> bool:
    """Whether a Host header names this machine itself: a loopback address, ``localhost`` or a name below it."""
    text = host.decode("latin-1").lower()
    if text.startswith("["):
        name, closed, port = text[1:].partition("]")
        if not closed or (port and not port.removeprefix(":").isdigit()):
            return False
    else:
        name, colon, port = text.partition(":")
        if colon and not port.isdigit():
            return False
    name = name.removesuffix(".")
    return name.endswith(".localhost") or is_loopback(name)


def check_is_json(method: str, headers: Mapping[bytes, bytes]) -> None:
    """Refuse a call of the control plane that changes something and has a body that is not said to be JSON, or a media
    type that browsers send across sites without asking first. Raises ``UnsupportedMediaType``."""
    if method in _READS:
        return
    media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    has_body = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
    if media_type in _CORS_SAFELISTED_TYPES or (has_body and media_type != _JSON):
        raise UnsupportedMediaType("send the header content-type: application/json; nothing else is read here")
