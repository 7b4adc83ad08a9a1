"""What a history proves: pure, and from the history alone.

Every request is judged against the answer that is known beforehand (:mod:`tests.support.traffic`: each token names its
request and its place). An error is a violation unless a fault of the run explains it, and each kind of fault explains
only what users are told it can cause.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.traffic import Outcome, cells_of, judge
from worker.engines.simulated import chat_prompt
from worker.engines.simulated.tokens import count_tokens

from .history import Request, requests_of
from .plan import Kind

AFTERMATH_S = 6.0
"""How long after a fault was healed it may still explain an error: leases, reconnects, a Router's next sweep."""
LEASE_S, SCAN_S = 3.0, 0.5
"""The stage's settings: what a hang may cost is their sum."""

_ROUTER_FAULTS = (Kind.KILL_ROUTER,)
_QUEUE_AWAY = (Kind.KILL_REDIS, Kind.CUT_ROUTER, Kind.PAUSE_ROUTER, Kind.LOSE_REPLIES)


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise, and the request that shows it (None: the whole run does)."""

    promise: str
    what: str
    request: Request | None = None

    def __str__(self) -> str:
        who = f"request {self.request.number} ({self.request.kind}): " if self.request is not None else ""
        return f"{self.promise}: {who}{self.what}"


@dataclass(slots=True)
class Verdict:
    """The figures of a run and everything that was wrong."""

    requests: int = 0
    acknowledged: int = 0
    completed: int = 0
    lost: int = 0
    duplicated: int = 0
    spliced: int = 0
    explained: Counter[str] = field(default_factory=Counter)
    counts: dict[str, int] = field(default_factory=dict)
    kill_to_start_s: list[float] = field(default_factory=list)
    hang_to_start_s: list[float] = field(default_factory=list)
    """Both only of faults beside which no other was under way."""
    faults: int = 0
    violations: list[Violation] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Span:
    kind: str
    target: int
    begin_s: float
    end_s: float

    def touches(self, request: Request) -> bool:
        return request.begun_s <= self.end_s + AFTERMATH_S and request.ended_s >= self.begin_s


def check(entries: Sequence[dict[str, Any]], *, must_prove: Iterable[str] = ()) -> Verdict:
    """Judge a history. ``must_prove``: counts that must not be 0, or the run has proved nothing."""
    verdict = Verdict()
    spans = _spans(entries)
    verdict.faults = len(spans)
    for request in requests_of(entries):
        verdict.requests += 1
        _judge(request, spans, verdict)
    for entry in entries:
        if entry["what"] == "recovery" and not entry["beside"]:
            times = verdict.kill_to_start_s if entry["how"] == "kill" else verdict.hang_to_start_s
            times.append(entry["seconds"])
        elif entry["what"] == "counts":
            verdict.counts = entry["counts"]
        elif entry["what"] == "final":
            for name, value in entry["left"].items():
                if value:
                    verdict.violations.append(Violation("nothing is left behind", f"{name}: {value}"))
    for name in must_prove:
        if not verdict.counts.get(name):
            verdict.violations.append(Violation("the run proves something", f"{name} never happened"))
    return verdict


def _judge(request: Request, spans: Sequence[_Span], verdict: Verdict) -> None:
    wrong = _seen_wrong(request)
    if wrong is not None:
        if wrong.promise == "no duplicate":
            verdict.duplicated += 1
        elif wrong.promise == "no splice":
            verdict.spliced += 1
        verdict.violations.append(wrong)
        verdict.acknowledged += 1
        return
    if request.end == "answered":
        verdict.acknowledged += 1
        verdict.completed += 1
        return
    why = _explanation(request, spans)
    if request.end == "silent" or why is None:
        verdict.acknowledged += 1
        verdict.lost += 1
        said = f"{request.end}, status {request.status}, {request.code or 'no code'}: {request.message[:200]}"
        verdict.violations.append(Violation("no loss", said, request))
        return
    verdict.explained[why] += 1


def _seen_wrong(request: Request) -> Violation | None:
    """What the client saw that no fault may cause."""
    if request.kind in ("embedding", "malformed") or (request.status >= 400 and not request.text):
        return None
    whole = request.end == "answered"
    for look in (_wrong_text, _wrong_frame, *((_wrong_end,) if whole else ())):
        if wrong := look(request):
            promise, what = wrong
            return Violation(promise, what, request)
    return None


def _wrong_text(request: Request) -> tuple[str, str] | None:
    whole = request.end == "answered"
    outcome, reason = judge(request.text, request.number, request.cells, whole=whole)
    if outcome is Outcome.RIGHT:
        return None
    if cells_of(request.number, request.cells).startswith(request.text):
        return "no loss", f"the answer ends early: {reason}"
    return "no duplicate" if _repeats(request) else "no splice", reason


def _wrong_frame(request: Request) -> tuple[str, str] | None:
    if len(set(request.ids)) > 1:
        return "no splice", f"{len(set(request.ids))} ids in one stream"
    if max(request.roles, len(request.finishes), request.done, request.usages) > 1:
        seen = f"{request.roles} roles, {request.finishes} finishes, {request.done} ends, {request.usages} usages"
        return "no duplicate", seen
    return None


def _wrong_end(request: Request) -> tuple[str, str] | None:
    if "stream" in request.kind and (request.done, len(request.finishes)) != (1, 1):
        return "no loss", f"{request.done} ends, {len(request.finishes)} finishes"
    if request.usage and (wrong := _wrong_usage(request)):
        return "no splice", wrong
    return None


def _repeats(request: Request) -> bool:
    cells = [request.text[at : at + 4] for at in range(0, len(request.text), 4)]
    mine = {cell for cell in cells if cell.startswith(cells_of(request.number, 1)[:3])}
    return len(mine) < len(cells) and len(mine) == len(set(cells))


def _wrong_usage(request: Request) -> str:
    text = cells_of(request.number, request.cells)
    prompt = text if request.kind.startswith("completion") else chat_prompt([("user", text)])
    wanted = (count_tokens(prompt), request.cells)
    told = (request.usage.get("prompt_tokens"), request.usage.get("completion_tokens"))
    return "" if told == wanted else f"usage {told} where {wanted} is right"


def _explanation(request: Request, spans: Sequence[_Span]) -> str | None:
    """The fault, or the request's own nature, that explains why it was not answered; None if nothing does."""
    if request.end == "left":
        return "the client left"
    if request.kind == "malformed" and 400 <= request.status < 500:
        return "malformed, refused"
    if request.kind == "deadline" and (request.status == 504 or request.code == "deadline_exceeded"):
        return "its own deadline"
    touching = [span for span in spans if span.touches(request)]
    if request.end == "cut":
        cut = [span for span in touching if span.kind in _ROUTER_FAULTS and span.target == request.router]
        return "its router was killed" if cut else None
    if request.end == "error" and (request.status == 503 or request.code == "broker_unavailable"):
        away = [span for span in touching if span.kind in _QUEUE_AWAY]
        begun = [span for span in touching if span.kind in _ROUTER_FAULTS and span.target == request.router]
        return (
            "refused while the queue was away" if away else "refused by a router that had just begun" if begun else None
        )
    return None


def _spans(entries: Sequence[dict[str, Any]]) -> list[_Span]:
    healed = {entry["number"]: entry["t"] for entry in entries if entry["what"] == "healed"}
    return [
        _Span(entry["kind"], entry["target"], entry["t"], healed.get(entry["number"], float("inf")))
        for entry in entries
        if entry["what"] == "fault"
    ]
