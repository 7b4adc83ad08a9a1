"""Admission: who asks, how much, until when, for which model. Each rule accepts or raises the error to answer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import cast, get_args

from queue_schemas import (
    AuthenticationFailed,
    BadMessage,
    BadRequest,
    BodyTooLarge,
    CannotStart,
    ModelNotFound,
    NoWorker,
    OnLoss,
    Tenant,
)
from queue_schemas.ids import check_name

from ..model_directory import Directory, OnNoWorker

DEADLINE_HEADER = "x-inferq-deadline-ms"
ON_LOSS_HEADER = "x-inferq-on-loss"
IDEMPOTENCY_HEADER = "idempotency-key"
BACKGROUND_HEADER = "x-inferq-background"
RESUMABLE_HEADER = "x-inferq-resumable"
NO_WORKER_RETRY_S = 5
_SHOWN_MODELS = 10
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
    scheme, _, bearer = authorization.partition(b" ")
    given = bearer.strip() if scheme.lower() == b"bearer" else api_key
    digest = hashlib.sha256(given).digest()
    tenant = keys.get(digest)
    if tenant is None or not given:
        how = "send it as: Authorization: Bearer KEY"
        raise AuthenticationFailed(f"the API key is {'not known here' if given else 'missing'}; {how}")
    return tenant


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


def read_deadline(header: bytes | None, timeout_s: float | None, default_ms: int, max_ms: int) -> int:
    """How long the request may take, in ms: the caller's ``x-inferq-deadline-ms``, or else the body's ``timeout``
    (seconds, above 0), or else ``default_ms``; at most ``max_ms``."""
    if header is None and timeout_s is not None:
        return max(1, int(min(timeout_s * 1000, max_ms)))
    if header is None:
        return default_ms
    if not header.isdigit() or len(header) > 15 or int(header) < 1:
        raise BadRequest(f"{DEADLINE_HEADER} must be a whole number of milliseconds, at least 1", param=DEADLINE_HEADER)
    return min(int(header), max_ms)


def read_on_loss(header: bytes | None, default: OnLoss) -> OnLoss:
    """What becomes of a stream whose worker is lost: the caller's ``x-inferq-on-loss``."""
    if header is None:
        return default
    for policy in get_args(OnLoss):
        if header == policy.encode():
            return cast(OnLoss, policy)
    raise BadRequest(f"{ON_LOSS_HEADER} must be continue, restart or fail", param=ON_LOSS_HEADER)


def read_flag(header: bytes | None, name: str, default: bool = False) -> bool:
    """Whether the caller's header ``name`` is ``true``; ``default`` without it."""
    if header is None:
        return default
    if header.lower() not in (b"true", b"false"):
        raise BadRequest(f"{name} must be true or false", param=name)
    return header.lower() == b"true"


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


def check_model(model: str, directory: Directory, on_no_worker: OnNoWorker) -> None:
    """Refuse a model nobody knows with ``ModelNotFound``, and with ``NoWorker`` one that no worker serves now, where
    ``on_no_worker`` says so."""
    if model not in directory.pools:
        known = sorted(directory.pools)
        names = ", ".join(known[:_SHOWN_MODELS]) + (", ..." if len(known) > _SHOWN_MODELS else "")
        there_are = f"known are: {names}" if known else "no worker has registered a model yet"
        raise ModelNotFound(f"the model {model!r} does not exist here; {there_are}", param="model")
    if on_no_worker == "refuse" and not directory.pools[model].workers:
        raise NoWorker(
            f"no worker serves {model} now; try again later, or start one",
            param="model",
            retry_after_s=NO_WORKER_RETRY_S,
        )
