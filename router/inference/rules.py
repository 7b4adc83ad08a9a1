"""Reads the headers that control one inference request: deadline, loss policy, flags. Raises ``BadRequest``."""

from __future__ import annotations

from typing import cast, get_args

from queue_schemas import BadRequest, OnLoss

DEADLINE_HEADER = "x-inferq-deadline-ms"
ON_LOSS_HEADER = "x-inferq-on-loss"
BACKGROUND_HEADER = "x-inferq-background"
RESUMABLE_HEADER = "x-inferq-resumable"


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
