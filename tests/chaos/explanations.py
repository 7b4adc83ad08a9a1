"""Decide which fault explains an unanswered request: pure, and as narrow as the promise to users.

An explanation needs a cause during the request, at its Router or at a shared part, and exactly the documented error.
A request without one is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .history import Entry, Request
from .plan import LEASE_S, Kind
from .workload import ENGINE_ERROR, GARBAGE, MALFORMED, POISON

MAX_ATTEMPTS = 4
"""Maximum attempts of the fleet's jobs."""
POISONED = "poison, given up"
INSTANT_S = 0.3
"""By how much the times of one event may differ between two processes."""
RELINK_S = 4.0
"""How long a Router may refuse after its queue is back: it reconnects after 2 s at the latest, then checks it."""
DEADLINE_SLACK_S = 3.0
"""How late the error of a deadline may come: the Router's grace and sweep, and the machine's delays."""
_ROUTER_KILLS = (Kind.KILL_ROUTER, Kind.KILL_PROCESS, Kind.STRIKE_ROUTER)
_ROUTER_APART = (Kind.CUT_ROUTER, Kind.SILENT_ROUTER, *_ROUTER_KILLS)
_QUEUE_AWAY = (Kind.KILL_REDIS, Kind.PAUSE_REDIS, Kind.FULL_DISK)
_LIST_UNREAD = (Kind.SLICED_NETWORK, Kind.SLOW_NETWORK)
"""Faults under which a Router may fail to read the list of models, though it can enqueue."""
_WORKER_LOSSES = (
    Kind.KILL_WORKER, Kind.KILL_ENGINE, Kind.PAUSE_WORKER, Kind.PAUSE_ENGINE, Kind.DRAIN_WORKER, Kind.CUT_WORKER,
    Kind.SILENT_WORKER, Kind.STRIKE_WORKER, Kind.POISON, Kind.SLICED_NETWORK, Kind.SLOW_NETWORK, Kind.PAUSE_REDIS,
)  # fmt: skip
_DEATHS = (
    Kind.KILL_WORKER, Kind.KILL_ENGINE, Kind.PAUSE_WORKER, Kind.PAUSE_ENGINE, Kind.CUT_WORKER, Kind.SILENT_WORKER,
    Kind.STRIKE_WORKER, Kind.POISON,
)  # fmt: skip
"""Faults that count as an attempt."""


@dataclass(frozen=True, slots=True)
class Span:
    """One fault, from its start until it was healed (infinity, if it never was)."""

    number: int
    kind: str
    target: int
    begin_s: float
    end_s: float

    def meets(self, begin_s: float, end_s: float, after_s: float = INSTANT_S) -> bool:
        """Whether it was active, or over for less than ``after_s``, at any time in between."""
        return begin_s <= self.end_s + after_s and end_s >= self.begin_s


def spans_of(entries: Iterable[Entry]) -> list[Span]:
    """The faults of a history."""
    entries = list(entries)
    healed = {entry["number"]: entry["t"] for entry in entries if entry["what"] == "healed"}
    return [
        Span(entry["number"], entry["kind"], entry["target"], entry["t"], healed.get(entry["number"], float("inf")))
        for entry in entries
        if entry["what"] == "fault"
    ]


def explanation(request: Request, spans: Sequence[Span]) -> str | None:
    """The fault, or the request's own kind, that explains why it was not answered; None if nothing does."""
    if request.key:
        return None  # its client retries until there is an answer
    if request.end == "left":
        return "the client left"
    if request.end == "cut":
        kills = [span for span in spans if span.kind in _ROUTER_KILLS and span.target == request.router]
        met = any(span.meets(request.sent_s, request.ended_s) for span in kills)
        return "its router was killed" if met else None
    if request.end != "error":
        return None
    return _own_nature(request) or _refusal(request, spans) or _end_of_attempts(request, spans)


def _own_nature(request: Request) -> str | None:
    if request.kind == MALFORMED and 400 <= request.status < 500:
        return "malformed, refused"
    if request.deadline_s and (request.status == 504 or request.code == "deadline_exceeded"):
        return "its own deadline"
    if request.kind == GARBAGE and request.code == "engine_failed" and not request.text:
        return "its engine's answer was garbage, refused"
    if request.kind == POISON and request.code == "attempts_exhausted":
        return POISONED
    return None


def _refusal(request: Request, spans: Sequence[Span]) -> str | None:
    """A Router refuses at once while it has no queue; a name that it does not know also while it cannot read the list
    of models, as after a pause of its own: it may have been away for longer than its call had."""
    if request.code not in ("broker_unavailable", "broker_full") or request.text:
        return None
    near = [span for span in spans if span.meets(request.ended_s, request.ended_s, RELINK_S)]
    own = [span for span in near if span.target == request.router]
    if _any(near, _QUEUE_AWAY) or _any(own, _ROUTER_APART):
        return "refused while the queue was away"
    if request.kind == MALFORMED and (_any(near, _LIST_UNREAD) or _any(own, (Kind.PAUSE_ROUTER,))):
        return "an unknown model, while the list of models could not be read"
    return None


def _end_of_attempts(request: Request, spans: Sequence[Span]) -> str | None:
    within = [span for span in spans if span.meets(request.sent_s, request.ended_s)]
    if request.code == "stream_broken" and request.on_loss == "fail":
        lost = [span for span in spans if span.meets(request.sent_s, request.ended_s, LEASE_S + 1.0)]
        return "its worker was lost, and it asked to fail then" if _any(lost, _WORKER_LOSSES) else None
    if request.kind == ENGINE_ERROR and request.status == 500 and not request.text:
        lost = [span for span in spans if span.meets(request.sent_s, request.ended_s, LEASE_S + 1.0)]
        return "the engine failed, and no other worker was there" if _any(lost, _WORKER_LOSSES) else None
    if request.code == "attempts_exhausted":
        deaths = sum(span.kind in _DEATHS for span in within)
        return f"it lost {MAX_ATTEMPTS} workers" if deaths >= MAX_ATTEMPTS else None
    return None


def _any(spans: Iterable[Span], kinds: Sequence[Kind]) -> bool:
    return any(span.kind in kinds for span in spans)
