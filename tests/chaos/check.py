"""Check a history against each invariant of the wire contract: pure, from the history alone.

``answers`` finds what no client may see, ``explanations`` which fault explains a missing answer. This module checks
what needs more than one entry: times until something went on, what was left over, and whether the run proved anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .answers import DUPLICATE, LOSS, POISON_BOUND, SPLICE, find_fault
from .explanations import DEADLINE_SLACK_S, POISONED, Span, explanation, spans_of
from .history import Entry, Request, requests_of
from .plan import LEASE_S, SWEEP_S
from .workload import POISON, request_id

SCAN_S = 5 * SWEEP_S
"""Limit from the end of a lease to the next start: two sweeps, and the delay of a busy machine."""
SLACK_S = 2.0
"""Time that the contract allows, beyond lease and scan, until waiting work is leased."""
RENEWAL_S = LEASE_S / 5
ABORT_SLACK_S = 1.0
AFTER_EFFECT_S = 0.5
"""How long a healed fault may still disturb a measurement: a restarted process is ready again by then."""
STALL_S = 0.3
"""If the harness itself was stalled for so long, measured times say nothing about the product."""

INVARIANTS = {
    1: "no lost job",
    2: "one result, no phantom",
    3: "fence",
    4: "idempotency",
    7: "streams without gap or repeat",
    9: "isolation",
    10: "deadline and cancel",
    11: "poison bound",
    12: "conservation",
    13: "liveness",
}
"""Invariants of the wire contract that a history of clients can show."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise, and the request that shows it (None: the whole run)."""

    promise: str
    what: str
    request: Request | None = None

    def __str__(self) -> str:
        who = f"request {self.request.number} ({self.request.kind}): " if self.request is not None else ""
        return f"{self.promise}: {who}{self.what}"


@dataclass(slots=True)
class Verdict:
    """The numbers of a run, and every violation."""

    requests: int = 0
    acknowledged: int = 0
    completed: int = 0
    lost: int = 0
    duplicated: int = 0
    spliced: int = 0
    migrated: int = 0
    """Streams that lost their worker after their first output and still completed."""
    gaps: int = 0
    explained: Counter[str] = field(default_factory=Counter)
    counts: dict[str, int] = field(default_factory=dict)
    exercised: Counter[int] = field(default_factory=Counter)
    """By invariant: how often the run tested it."""
    kill_to_start_s: list[float] = field(default_factory=list)
    hang_to_start_s: list[float] = field(default_factory=list)
    """Only of faults that did not overlap with others."""
    heal_to_start_s: list[float] = field(default_factory=list)
    leave_to_abort_s: list[float] = field(default_factory=list)
    max_s: float = 0.0
    """The longest answered request."""
    faults: int = 0
    violations: list[Violation] = field(default_factory=list)

    def broken(self, promise: str, what: str, request: Request | None = None) -> None:
        """Record a violation."""
        self.violations.append(Violation(promise, what, request))


def check(entries: Sequence[Entry], *, must_prove: Iterable[str] = ()) -> Verdict:
    """Check a history. ``must_prove``: counters that must not be 0, or the run has proved nothing."""
    verdict = Verdict()
    spans = spans_of(entries)
    requests = requests_of(entries)
    verdict.faults = len(spans)
    resumed = {entry["request_id"] for entry in entries if entry["what"] == "log" and _is_resumed(entry)}
    for request in requests:
        verdict.requests += 1
        _check_request(request, spans, verdict, migrated=request.request_id in resumed)
    _check_recoveries(entries, spans, verdict)
    _check_liveness(requests, spans, verdict)
    _check_deadlines(requests, spans, verdict)
    _check_aborts(entries, requests, spans, verdict)
    _check_dead_letters(entries, requests, spans, verdict)
    _check_end(entries, verdict)
    _check_proof(verdict, must_prove)
    return verdict


def _check_request(request: Request, spans: Sequence[Span], verdict: Verdict, *, migrated: bool) -> None:
    verdict.exercised.update((1, 2, 9) if request.end == "answered" else (2, 9))
    verdict.exercised[4] += bool(request.tries or request.reused)
    verdict.exercised[7] += request.streams and bool(request.text)
    wrong = find_fault(request)
    if wrong is not None:
        verdict.lost += wrong.promise == LOSS
        verdict.duplicated += wrong.promise == DUPLICATE
        verdict.spliced += wrong.promise == SPLICE
        verdict.gaps += migrated
        verdict.acknowledged += 1
        verdict.broken(wrong.promise, wrong.what, request)
    elif request.end == "answered":
        verdict.acknowledged += 1
        verdict.completed += 1
        verdict.max_s = max(verdict.max_s, request.ended_s - request.sent_s)
        verdict.migrated += migrated
    elif (why := explanation(request, spans)) is not None:
        verdict.explained[why] += 1
    else:
        verdict.acknowledged += 1
        verdict.lost += 1
        said = f"{request.end}, status {request.status}, {request.code or 'no code'}: {request.message[:300]}"
        verdict.broken(LOSS, said, request)


def _check_recoveries(entries: Sequence[Entry], spans: Sequence[Span], verdict: Verdict) -> None:
    """The time from a worker's death to the next start of one of its jobs is bounded by lease and scan."""
    for entry in entries:
        if entry["what"] != "recovery":
            continue
        begin_s, seconds = entry["t"], entry["seconds"]
        others = [span for span in spans if span.number != entry["fault"]]
        if any(span.meets(begin_s, begin_s + seconds, AFTER_EFFECT_S) for span in others):
            continue
        verdict.exercised[13] += 1
        times = verdict.kill_to_start_s if entry["how"] == "kill" else verdict.hang_to_start_s
        times.append(seconds)
        if seconds > LEASE_S + SCAN_S and entry["stalled_s"] < STALL_S:
            verdict.broken("recovery", f"{entry['how']} to the next start took {seconds:.2f} s")


def _check_liveness(requests: Sequence[Request], spans: Sequence[Span], verdict: Verdict) -> None:
    """After healing, waiting work starts within lease, scan and two seconds."""
    limit_s = LEASE_S + SCAN_S + SLACK_S
    starts = sorted(request.first_byte_s for request in requests if request.first_byte_s)
    for span in spans:
        if span.end_s == float("inf"):
            verdict.broken("liveness", f"fault {span.number} ({span.kind}) was never healed")
            continue
        if any(other.meets(span.end_s, span.end_s + limit_s, 0.0) for other in spans if other is not span):
            continue
        # Somebody whose request was answered later waited then.
        if not any(r.sent_s <= span.end_s <= r.ended_s and r.end == "answered" for r in requests):
            continue
        verdict.exercised[13] += 1
        after = next((start for start in starts if start >= span.end_s), float("inf"))
        verdict.heal_to_start_s.append(after - span.end_s)
        if after - span.end_s > limit_s:
            verdict.broken("liveness", f"nothing was started for {after - span.end_s:.1f} s after {span.kind} was over")


def _check_deadlines(requests: Sequence[Request], spans: Sequence[Span], verdict: Verdict) -> None:
    for request in requests:
        if not request.deadline_s or request.end == "cut":
            continue
        verdict.exercised[10] += 1
        late_s = request.ended_s - request.sent_s - request.deadline_s
        if late_s <= DEADLINE_SLACK_S:
            continue
        if not any(span.meets(request.sent_s, request.ended_s, AFTER_EFFECT_S) for span in spans):
            verdict.broken("deadline", f"ended {late_s:.1f} s after its deadline, without any fault", request)


def _check_aborts(
    entries: Sequence[Entry], requests: Sequence[Request], spans: Sequence[Span], verdict: Verdict
) -> None:
    """When a client disconnects, its engine's slot is free within one renewal."""
    aborted = {entry["request_id"]: entry["t"] for entry in entries if _is_event(entry, "job_aborted")}
    for request in requests:
        at_s = aborted.get(request.request_id)
        if request.end != "left" or at_s is None:
            continue
        if any(span.meets(request.sent_s, at_s, AFTER_EFFECT_S) for span in spans):
            continue
        verdict.exercised[10] += 1
        verdict.leave_to_abort_s.append(at_s - request.ended_s)
        if at_s - request.ended_s > RENEWAL_S + ABORT_SLACK_S:
            verdict.broken("cancel", f"its engine worked on for {at_s - request.ended_s:.1f} s", request)


def _check_dead_letters(
    entries: Sequence[Entry], requests: Sequence[Request], spans: Sequence[Span], verdict: Verdict
) -> None:
    """Only poison becomes a dead letter, after its allowed attempts and no more; its neighbours finish."""
    by_id = {request_id(request.number): request for request in requests}
    for entry in entries:
        if entry["what"] != "dead_letter":
            continue
        verdict.exercised[11] += 1
        request = by_id.get(entry["request_id"])
        if entry["attempts"] > entry["allowed"]:
            verdict.broken(POISON_BOUND, f"{entry['attempts']} starts of {entry['request_id']}", request)
        if request is None or request.kind == POISON or explanation(request, spans) is not None:
            continue
        verdict.broken(POISON_BOUND, f"not poison, and a dead letter: {entry['cause'][:200]}", request)


def _check_end(entries: Sequence[Entry], verdict: Verdict) -> None:
    for entry in entries:
        if entry["what"] == "counts":
            verdict.counts = entry["counts"]
        elif entry["what"] == "final":
            verdict.exercised[12] += 1
            for name, value in entry["left"].items():
                if value:
                    verdict.broken("nothing is left behind", f"{name}: {value}")
        elif entry["what"] == "canaries" and entry["seen"]:
            verdict.broken("isolation", f"canaries were seen in {', '.join(entry['seen'])}")
    counts = verdict.counts
    if "enqueued" in counts:
        ended = sum(counts[state] for state in ("done", "failed", "cancelled", "expired", "dead"))
        if counts["enqueued"] != ended:
            verdict.broken("conservation", f"{counts['enqueued']} jobs were enqueued and {ended} ended")
    verdict.exercised[3] = counts.get("fenced", 0)


def _check_proof(verdict: Verdict, must_prove: Iterable[str]) -> None:
    numbers = verdict.counts | {
        "streams migrated": verdict.migrated,
        "kill measured": len(verdict.kill_to_start_s),
        "hang measured": len(verdict.hang_to_start_s),
        "poison given up": verdict.explained[POISONED],
    }
    for name in must_prove:
        if not numbers.get(name):
            verdict.broken("the run proves something", f"{name}: never seen")


def _is_event(entry: Entry, event: str) -> bool:
    return bool(entry["what"] == "log" and entry["event"] == event)


def _is_resumed(entry: Entry) -> bool:
    return _is_event(entry, "stream_resumed") and entry.get("delivered", 0) > 0
