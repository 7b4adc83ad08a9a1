"""Failures of the simulated engine: ordered in the body of one request, or drawn by rate.

A request orders one with a field no real engine knows::

    "sim": {"fail": "close_midstream", "after_tokens": 3, "times": 1, "on": "sim-1", "status": 500, "delay_ms": 100}

``after_tokens`` tokens are answered first (default 0). ``times`` bounds how many requests with this very order fail
(0: all of them), counted by each engine. ``on`` is the name of the one engine that fails. Only a simulated engine
reads the field; a real one ignores it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class FailureKind(StrEnum):
    """The failures that a request can order from the simulated engine."""

    ERROR = "500"
    """An error object with ``status`` (400 to 599); in a stream that has begun, an error event."""
    CRASH = "crash"
    """The engine's process ends at once, as by SIGKILL."""
    HANG = "hang"
    """Nothing more comes; the connection stays open until the caller closes it, an hour at most."""
    GARBAGE = "garbage"
    """Status 200 with bytes that are neither JSON nor a stream of events."""
    CLOSE_MIDSTREAM = "close_midstream"
    """The connection closes before the answer is complete."""
    SLOW = "slow"
    """Each token takes ``delay_ms`` at least."""
    NEVER_READY = "never_ready"
    """Status 503, as of an engine that is still loading its model."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One ordered failure."""

    kind: FailureKind
    after_tokens: int = 0
    status: int = 500
    delay_ms: float = 100.0
    times: int = 0
    on: str = ""


def parse_order(order: Any) -> Failure | None:
    """The failure that a request's ``sim`` field orders, None if it orders none. Raises ``ValueError``."""
    if not isinstance(order, dict):
        raise ValueError("sim must be an object")  # noqa: TRY004 - a wrong value in a request
    known = {"fail", "after_tokens", "status", "delay_ms", "times", "on"}
    if unknown := order.keys() - known:
        raise ValueError(f"sim has unknown fields {', '.join(sorted(unknown))}; it may have {', '.join(sorted(known))}")
    if "fail" not in order:
        return None
    kind, status = _kind_and_status(order["fail"], order.get("status", 500))
    return Failure(
        kind,
        after_tokens=_natural(order, "after_tokens", 0),
        status=status,
        delay_ms=_natural(order, "delay_ms", 100),
        times=_natural(order, "times", 0),
        on=str(order.get("on", "")),
    )


def parse_rates(text: str) -> dict[FailureKind, float]:
    """``"500=0.1,slow=0.05"`` as shares of all requests. Raises ``ValueError``."""
    rates = {}
    for part in filter(None, text.split(",")):
        kind, separator, rate = part.partition("=")
        if not separator:
            raise ValueError(f"{part!r} is not KIND=SHARE")
        rates[FailureKind(kind.strip())] = float(rate)
    return rates


def drawn_failure(rates: Mapping[FailureKind, float], seed: int, number: int) -> Failure | None:
    """The failure of the ``number``-th request of an engine with ``seed``, drawn by ``rates``."""
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    point = int.from_bytes(digest, "big") / 2**64
    for kind, rate in rates.items():
        if point < rate:
            return Failure(kind, after_tokens=digest[0] % 8)
        point -= rate
    return None


def _kind_and_status(fail: Any, status: Any) -> tuple[FailureKind, int]:
    # A number is short for the error object with that status.
    if isinstance(fail, int) or (isinstance(fail, str) and fail.isdigit()):
        fail, status = FailureKind.ERROR, int(fail)
    try:
        kind = FailureKind(fail)
    except ValueError:
        raise ValueError(f"unknown failure {fail!r}; known are {', '.join(FailureKind)}") from None
    if type(status) is not int or not 400 <= status <= 599:
        raise ValueError("the status of a failure is a number from 400 to 599")
    return kind, status


def _natural(order: dict[str, Any], name: str, default: int) -> int:
    value = order.get(name, default)
    if type(value) is not int or value < 0:
        raise ValueError(f"sim.{name} must be a number, 0 or more")
    return value
