"""Decides from the headers of one inference request: deadline, policy on loss, flags; and which error ends it.

Every function returns a value or raises ``BadRequest``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import cast, get_args

from queue_schemas import (
    AttemptsExhausted,
    BadRequest,
    DeadlineExceeded,
    InferqError,
    JobCancelled,
    MarkerKind,
    OnLoss,
)
from queue_schemas.records import record

DEADLINE_HEADER = "x-inferq-deadline-ms"
ON_LOSS_HEADER = "x-inferq-on-loss"
BACKGROUND_HEADER = "x-inferq-background"
DO_NOT_QUEUE_HEADER = "x-inferq-do-not-queue"
RESUMABLE_HEADER = "x-inferq-resumable"
SESSION_HEADER = "x-session-id"
"""A client's name for a conversation, whose requests go to one worker where that is free."""
TIER_HEADER = b"x-inferq-service-tier"
"""Of an answer: the service tier that its request had."""
DEFAULT_SETTING = "INFERQ_ROUTER_DEFAULT_DEADLINE_MS"
MAX_SETTING = "INFERQ_ROUTER_MAX_DEADLINE_MS"
BACKGROUND_SETTING = "INFERQ_ROUTER_BACKGROUND_DEADLINE_MS"
READ_TIMEOUT_HEADER = "x-stainless-read-timeout"
"""openai and anthropic for Python: seconds that they wait for the next byte, so for all of a plain answer."""
WHOLE_TIMEOUT_HEADER = "x-stainless-timeout"
"""openai for Node: the same, in whole seconds, rounded down: the earliest that the client may give up."""
_DEADLINE, _READ_TIMEOUT, _WHOLE_TIMEOUT = (
    name.encode() for name in (DEADLINE_HEADER, READ_TIMEOUT_HEADER, WHOLE_TIMEOUT_HEADER)
)
_SET_DEADLINES = frozenset({_DEADLINE, _READ_TIMEOUT, _WHOLE_TIMEOUT})
_SECONDS = re.compile(rb"[0-9]{1,9}(?:\.[0-9]{1,9})?")
_EARLIER_PART, _MAX_EARLIER_S = 0.1, 2.0
"""How much earlier than its client's time-out a request ends here. A client that gets the error does not repeat a
request that would fail again; one that times out by itself does, by default twice."""


@record
class Deadline:
    """``limit_ms`` from now on; ``description`` also says what set it. ``client_grace_s``: how long after it the client
    still waits to hear of it."""

    limit_ms: int
    description: str
    client_grace_s: float = float("inf")


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


def client_timeout_s(headers: Mapping[bytes, bytes]) -> tuple[float, str] | None:
    """How long the client itself waits, in s, and the header that says so; None if none does."""
    given = headers.get(_READ_TIMEOUT)
    if given is not None and _SECONDS.fullmatch(given) and float(given) > 0:
        return float(given), READ_TIMEOUT_HEADER
    given = headers.get(_WHOLE_TIMEOUT)
    if given is not None and given.isdigit() and len(given) < 10:
        return max(1.0, float(given)), WHOLE_TIMEOUT_HEADER
    return None


def find_deadline(
    headers: Mapping[bytes, bytes], timeout_s: float | None, default_ms: int, max_ms: int, *, waits: bool
) -> Deadline:
    """The deadline of a request: its ``x-inferq-deadline-ms``, or else the ``timeout`` of its body, or else the
    time-out of its client, or else ``default_ms``; at most ``max_ms``.

    ``waits``: it ends when its client's time-out does, because nothing is sent before the whole answer and nobody reads
    it later. Otherwise a client's time-out only makes the default longer. Raises ``BadRequest``.
    """
    if timeout_s is None and _SET_DEADLINES.isdisjoint(headers):
        return _default_deadline(default_ms, max_ms)
    given = headers.get(_DEADLINE)
    limit_ms = read_deadline(given, timeout_s, default_ms, max_ms)
    client_grace_s = float("inf")
    if given is not None:
        source, asked_ms = DEADLINE_HEADER, float(given)
    elif timeout_s is not None:
        source, asked_ms = "timeout in the request's body", timeout_s * 1000
    else:
        source, asked_ms = DEFAULT_SETTING, float(default_ms)
        client = client_timeout_s(headers)
        if client is not None:
            seconds, header = client
            ends_ms = max(1.0, 1000 * (seconds - min(_MAX_EARLIER_S, seconds * _EARLIER_PART)))
            if waits or ends_ms > default_ms:
                source, asked_ms = f"the client's time-out, {header}", ends_ms
                if waits:
                    client_grace_s = (seconds - ends_ms / 1000) / 2
        limit_ms = max(1, int(min(asked_ms, max_ms)))
    if asked_ms > max_ms:
        source, client_grace_s = MAX_SETTING, float("inf")
    return Deadline(limit_ms, _description(limit_ms, source), client_grace_s)


@lru_cache(16)
def _default_deadline(default_ms: int, max_ms: int) -> Deadline:
    source = MAX_SETTING if default_ms > max_ms else DEFAULT_SETTING
    limit_ms = max(1, min(default_ms, max_ms))
    return Deadline(limit_ms, _description(limit_ms, source))


@lru_cache(256)
def _description(limit_ms: int, source: str) -> str:
    return f"{limit_ms} ms (set by {source})"


def background_deadline(header: bytes | None, timeout_s: float | None, max_ms: int) -> Deadline:
    """The deadline of a background job: as long as it may take unless the request asks for less."""
    limit_ms = read_deadline(header, timeout_s, max_ms, max_ms)
    return Deadline(limit_ms, f"{limit_ms} ms (at most {BACKGROUND_SETTING})")


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


def ending_error(kind: MarkerKind, reason: str) -> InferqError:
    """The error that answers a request whose job ended as ``kind``, without an answer."""
    match kind:
        case MarkerKind.DEAD:
            why = reason or "it was lost"
            return AttemptsExhausted(f"every attempt to answer the request failed, the last because {why}")
        case MarkerKind.CANCELLED:
            return JobCancelled(f"the request was cancelled: {reason or 'no reason was given'}")
        case MarkerKind.EXPIRED:
            return DeadlineExceeded(f"the request was not answered in time: {reason or 'its deadline passed'}")
        case _:
            raise ValueError(f"a job does not end as {kind}")
