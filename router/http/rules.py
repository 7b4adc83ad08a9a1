"""Decides on the parts every HTTP request has: API key, size, idempotency key. Returns values or raises."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from queue_schemas import AuthenticationFailed, BadMessage, BadRequest, BodyTooLarge, CannotStart, Tenant
from queue_schemas.ids import check_name

IDEMPOTENCY_HEADER = "idempotency-key"
_KEY = re.compile(rb"[ -~]{1,255}")
_HASH = re.compile(r"[0-9a-fA-F]{64}")

KeyRing = Mapping[bytes, Tenant]
"""SHA-256 digest of an API key -> its tenant."""


def parse_keys(text: str, source: str) -> dict[bytes, Tenant]:
    """API keys as a file or the environment gives them: ``<sha256 of the key in hex>:<tenant>`` on each line (or
    between commas), ``#`` begins a comment. Raises ``CannotStart`` that names ``source`` and the line."""
    keys: dict[bytes, Tenant] = {}
    for number, line in enumerate(text.replace(",", "\n").splitlines(), 1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        digest, _, tenant = entry.partition(":")
        if not _HASH.fullmatch(digest):
            raise CannotStart(
                f"{source}, line {number}: expected <sha256 of the key, 64 hex digits>:<tenant>; "
                "make one with: printf %s KEY | sha256sum"
            )
        try:
            keys[bytes.fromhex(digest)] = Tenant(check_name(tenant.strip(), "tenant"))
        except BadMessage as error:
            raise CannotStart(f"{source}, line {number}: {error.message}") from None
    return keys


def authenticate(keys: KeyRing, authorization: bytes, api_key: bytes) -> Tenant:
    """The tenant of the key in ``Authorization: Bearer`` or ``x-api-key``. Raises ``AuthenticationFailed``.

    The work does not depend on how much of a key is right: keys are compared by their digests.
    """
    bearer = bearer_key(authorization)
    given = api_key if bearer is None else bearer
    digest = hashlib.sha256(given).digest()
    tenant = keys.get(digest)
    if tenant is None or not given:
        how = "send it as: Authorization: Bearer KEY"
        raise AuthenticationFailed(f"the API key is {'not known here' if given else 'missing'}; {how}")
    return tenant


def bearer_key(authorization: bytes) -> bytes | None:
    """The key in ``Authorization: Bearer KEY``; None for another scheme."""
    scheme, _, key = authorization.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else None


def check_size(size_bytes: int, limit_bytes: int) -> None:
    """Refuse a body, read or announced, of more than ``limit_bytes`` with ``BodyTooLarge``."""
    if size_bytes > limit_bytes:
        raise BodyTooLarge(f"the body has more than {limit_bytes} bytes, which is the limit here: send less at once")


def announced_size(content_length: bytes | None) -> int:
    """Bytes that the header announces, 0 without it. Raises ``BadRequest`` for one that is no number."""
    if content_length is None:
        return 0
    if not content_length.isdigit() or len(content_length) > 18:
        raise BadRequest("content-length must be a number of bytes")
    return int(content_length)


def read_idempotency_key(header: bytes | None) -> str:
    """The caller's name for the request, under which it is run once however often it is sent; empty without one."""
    if header is None:
        return ""
    if not _KEY.fullmatch(header):
        raise BadRequest(
            f"{IDEMPOTENCY_HEADER} must be 1 to 255 printable ASCII characters, the same for each try of one request",
            param=IDEMPOTENCY_HEADER,
        )
    return header.decode("ascii")
