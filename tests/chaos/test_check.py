"""Test the checker: histories made by hand, each with one error, or with an explanation."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from tests.support.fault_proxy import Point
from tests.support.traffic import cells_text
from worker.engines.simulated.api.answers import embedding
from worker.engines.simulated.tokens import count_tokens

from .answers import DIMENSIONS
from .check import SCAN_S, SLACK_S, STALL_S, check
from .explanations import MAX_ATTEMPTS, RELINK_S
from .history import Entry, Request
from .plan import LEASE_S, Kind, draw, opening
from .report import describe_violations, table
from .workload import MODEL, prompt_of

TEXT = cells_text(7, 8)
PROMPT_TOKENS = count_tokens(prompt_of(7, "chat stream", 8, "acme"))


def right(**changes: Any) -> Request:
    """A stream with the right answer."""
    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 8, "total_tokens": PROMPT_TOKENS + 8}
    fields: dict[str, Any] = {
        "number": 7, "kind": "chat stream", "router": 0, "cells": 8, "sent_s": 10.0, "tenant": "acme",
        "end": "answered", "first_byte_s": 10.1, "ended_s": 11.0, "status": 200, "text": TEXT, "ids": ["a"], "roles": 1,
        "finishes": ["stop"], "done": 1, "usage": usage, "usages": 1, "request_id": "chaos-7",
    }  # fmt: skip
    return Request(**(fields | changes))


def history(request: Request, *faults: tuple[Kind, float, float], target: int = 0) -> list[Entry]:
    """A history of one request and some faults (kind, begin, end)."""
    entries: list[Entry] = []
    for number, (kind, begin_s, end_s) in enumerate(faults):
        entries.append({"t": begin_s, "what": "fault", "number": number, "kind": kind, "target": target})
        entries.append({"t": end_s, "what": "healed", "number": number})
    return [*entries, {"t": request.ended_s, "what": "request", **asdict(request)}]


def log_entry(event: str, at_s: float, **more: Any) -> Entry:
    """A line of a role's log about the request."""
    return {"t": at_s, "what": "log", "role": "worker-1", "event": event, "request_id": "chaos-7", **more}


def broken(entries: list[Entry]) -> list[str]:
    """The promises that a history shows broken."""
    return [violation.promise for violation in check(entries).violations]


def test_a_right_answer_is_completed() -> None:
    """Nothing is wrong with it."""
    verdict = check(history(right()))
    assert (verdict.acknowledged, verdict.completed, verdict.max_s, verdict.violations) == (1, 1, 1.0, [])


@pytest.mark.parametrize(
    ("changes", "promise"),
    [
        ({"text": TEXT[:-4]}, "no loss"),
        ({"text": TEXT[:8] + TEXT[12:]}, "no splice"),
        ({"text": TEXT[:8] + TEXT[4:]}, "no duplicate"),
        ({"text": TEXT[:8] + cells_text(8, 8)[8:]}, "no splice"),
        ({"text": TEXT[:8] + cells_text(8, 1), "end": "error", "code": "x"}, "no splice"),
        ({"request_id": "chaos-8"}, "no splice"),
        ({"text": "canary.globex.0123"}, "isolation"),
        ({"end": "error", "status": 400, "text": "", "message": "no canary.globex.0123"}, "isolation"),
        ({"kind": "engine garbage"}, "no splice"),
        ({"kind": "poison"}, "poison bound"),
        ({"kind": "poison", "end": "error", "code": "attempts_exhausted", "text": TEXT[4:8]}, "no splice"),
        ({"kind": "embedding", "vector": [0.0] * 8}, "no splice"),
        ({"ids": ["a", "b"]}, "no splice"),
        ({"roles": 2}, "no duplicate"),
        ({"finishes": ["stop", "stop"]}, "no duplicate"),
        ({"done": 2}, "no duplicate"),
        ({"usages": 2}, "no duplicate"),
        ({"done": 0}, "no loss"),
        ({"finishes": []}, "no loss"),
        ({"usage": {"prompt_tokens": PROMPT_TOKENS + 3, "completion_tokens": 5, "total_tokens": 8}}, "no splice"),
        ({"end": "silent"}, "no loss"),
        ({"end": "cut", "text": TEXT[:8]}, "no loss"),
        ({"end": "error", "status": 200, "code": "stream_broken", "text": TEXT[:8]}, "no loss"),
        ({"end": "error", "status": 502, "code": "attempts_exhausted", "text": ""}, "no loss"),
        ({"end": "error", "status": 503, "code": "broker_unavailable", "text": ""}, "no loss"),
        ({"end": "error", "status": 504, "code": "deadline_exceeded", "text": ""}, "no loss"),
    ],
)
def test_each_error_is_found(changes: dict[str, Any], promise: str) -> None:
    """It is reported as the promise that it breaks, with its events."""
    entries = history(right(**changes))
    verdict = check(entries)
    assert [violation.promise for violation in verdict.violations] == [promise]
    assert "VIOLATION" in describe_violations(verdict, entries)


CUT: dict[str, Any] = {"end": "cut", "text": TEXT[:8]}
REFUSED: dict[str, Any] = {"end": "error", "status": 503, "code": "broker_unavailable", "text": ""}
UNKNOWN_MODEL: dict[str, Any] = REFUSED | {"kind": "malformed"}
BROKEN: dict[str, Any] = {"end": "error", "code": "stream_broken", "text": TEXT[:8], "on_loss": "fail"}
ENGINE_FAILED: dict[str, Any] = {"kind": "engine error", "end": "error", "status": 500, "code": "", "text": ""}
GIVEN_UP: dict[str, Any] = {"end": "error", "status": 502, "code": "attempts_exhausted", "text": ""}


@pytest.mark.parametrize(
    ("changes", "fault", "why"),
    [
        (CUT, Kind.KILL_ROUTER, "its router was killed"),
        (CUT, Kind.STRIKE_ROUTER, "its router was killed"),
        (REFUSED, Kind.KILL_REDIS, "refused while the queue was away"),
        (REFUSED | {"code": "broker_full"}, Kind.FULL_DISK, "refused while the queue was away"),
        (UNKNOWN_MODEL, Kind.PAUSE_ROUTER, "an unknown model, while the list of models could not be read"),
        (UNKNOWN_MODEL, Kind.SLICED_NETWORK, "an unknown model, while the list of models could not be read"),
        (BROKEN, Kind.KILL_WORKER, "its worker was lost, and it asked to fail then"),
        (GIVEN_UP | {"kind": "poison"}, Kind.POISON, "poison, given up"),
        (REFUSED | {"code": "deadline_exceeded", "deadline_s": 0.3}, Kind.POISON, "its own deadline"),
        (REFUSED | {"kind": "malformed", "status": 400}, Kind.POISON, "malformed, refused"),
        (ENGINE_FAILED, Kind.KILL_WORKER, "the engine failed, and no other worker was there"),
        ({"end": "left", "text": TEXT[:8]}, Kind.KILL_WORKER, "the client left"),
    ],
)
def test_what_a_fault_explains_is_no_violation(changes: dict[str, Any], fault: Kind, why: str) -> None:
    """As long as that fault was active."""
    verdict = check(history(right(**changes), (fault, 9.0, 10.9)))
    assert (dict(verdict.explained), verdict.violations) == ({why: 1}, [])


@pytest.mark.parametrize(
    ("changes", "fault", "target"),
    [
        (CUT, (Kind.KILL_ROUTER, 9.0, 9.5), 0),
        (CUT, (Kind.KILL_ROUTER, 9.0, 10.5), 1),
        (CUT, (Kind.KILL_REDIS, 9.0, 10.5), 0),
        (REFUSED, (Kind.KILL_REDIS, 1.0, 10.9 - RELINK_S), 0),
        (REFUSED, (Kind.CUT_ROUTER, 9.0, 10.5), 1),
        (REFUSED, (Kind.KILL_WORKER, 9.0, 10.5), 0),
        (REFUSED, (Kind.PAUSE_ROUTER, 9.0, 10.5), 0),
        (REFUSED, (Kind.SLICED_NETWORK, 9.0, 10.5), 0),
        (UNKNOWN_MODEL, (Kind.PAUSE_ROUTER, 9.0, 10.5), 1),
        (UNKNOWN_MODEL, (Kind.PAUSE_ROUTER, 1.0, 10.9 - RELINK_S), 0),
        (REFUSED | {"text": TEXT[:8]}, (Kind.KILL_REDIS, 9.0, 10.5), 0),
        (BROKEN | {"on_loss": "continue"}, (Kind.KILL_WORKER, 9.0, 10.5), 0),
        (BROKEN, (Kind.KILL_MANAGER, 9.0, 10.5), 0),
        (GIVEN_UP, (Kind.KILL_WORKER, 9.0, 10.5), 0),
        ({"end": "silent"}, (Kind.KILL_REDIS, 9.0, 10.5), 0),
    ],
)
def test_a_fault_explains_nothing_else(changes: dict[str, Any], fault: tuple[Kind, float, float], target: int) -> None:
    """A fault that is over too long, at another Router, of another kind or with another error leaves a loss."""
    assert broken(history(right(**changes), fault, target=target)) == ["no loss"]


def test_attempts_are_used_up_only_by_as_many_deaths() -> None:
    """One less does not explain it."""
    deaths = [(Kind.KILL_WORKER, 9.0 + number / 10, 10.5) for number in range(MAX_ATTEMPTS)]
    assert broken(history(right(**GIVEN_UP), *deaths)) == []
    assert broken(history(right(**GIVEN_UP), *deaths[1:])) == ["no loss"]


def test_a_right_vector_is_completed() -> None:
    """It follows from model and text."""
    vector = embedding(cells_text(7, 8), MODEL, 0, DIMENSIONS)[:8]
    assert check(history(right(kind="embedding", text="", vector=vector))).completed == 1


@pytest.mark.parametrize(("how", "limit_s"), [("kill", LEASE_S + SCAN_S), ("hang", LEASE_S + SCAN_S)])
def test_recoveries_count_undisturbed_and_have_a_limit(how: str, limit_s: float) -> None:
    """Past lease and scan one is a violation, unless the machine stood still; beside another fault it says nothing."""

    def recovered(seconds: float, stalled_s: float = 0.0, *others: tuple[Kind, float, float]) -> list[Entry]:
        entries = history(right(), (Kind.KILL_WORKER, 2.0, 9.0), *others)
        fields = {"how": how, "fault": 0, "seconds": seconds, "stalled_s": stalled_s}
        return [*entries, {"t": 2.0, "what": "recovery", **fields}]

    verdict = check(recovered(limit_s - 0.1))
    assert (len(verdict.kill_to_start_s + verdict.hang_to_start_s), verdict.violations) == (1, [])
    assert broken(recovered(limit_s + 0.1)) == ["recovery"]
    assert broken(recovered(limit_s + 0.1, STALL_S)) == []
    beside = check(recovered(limit_s + 0.1, 0.0, (Kind.SLOW_NETWORK, 3.0, 4.0)))
    assert (beside.kill_to_start_s, beside.hang_to_start_s, beside.violations) == ([], [], [])


def tried(**changes: Any) -> Entry:
    """One try of a request under its key."""
    return {"router": 1, "end": "cut", "status": 200, "code": "", "text": TEXT[:8], "ids": ["a"]} | changes


def test_a_key_is_one_answer() -> None:
    """Every retry gets the beginning or all of the same answer; nothing explains a key without an answer."""
    keyed = {"kind": "keyed chat stream", "key": "k"}
    right_tries = [tried(), tried(end="answered", text=TEXT)]
    verdict = check(history(right(**keyed, tries=right_tries, reused=422)))
    assert (verdict.exercised[4], verdict.violations) == (1, [])
    assert broken(history(right(**keyed, tries=[tried(ids=["b"])]))) == ["idempotency"]
    assert broken(history(right(**keyed, reused=200))) == ["idempotency"]
    assert broken(history(right(**keyed, reused=503))) == []
    assert broken(history(right(**keyed, tries=[tried(text=TEXT[4:8])]))) == ["no splice"]
    assert broken(history(right(**keyed, tries=[tried(end="answered")]))) == ["no splice"]
    assert broken(history(right(**keyed, **CUT), (Kind.KILL_ROUTER, 9.0, 10.9))) == ["no loss"]


def test_after_healing_work_goes_on() -> None:
    """It is a violation if nothing starts within lease, scan and slack, or if a fault is never healed."""
    limit_s = LEASE_S + SCAN_S + SLACK_S
    late = right(first_byte_s=11.0 + limit_s, ended_s=12.0 + limit_s)
    assert broken(history(late, (Kind.KILL_REDIS, 10.2, 10.5))) == ["liveness"]
    assert broken(history(right(first_byte_s=10.6), (Kind.KILL_REDIS, 10.2, 10.5))) == []
    assert broken(history(right(), (Kind.KILL_REDIS, 10.2, 10.5))[:1]) == ["liveness"]


def test_streams_that_lost_a_worker_are_counted_as_migrated_if_they_are_whole() -> None:
    """An incomplete one is a gap; a stream that lost its worker before any output does not count."""
    resumed = log_entry("stream_resumed", 10.5, delivered=12)
    whole = check([*history(right()), resumed])
    assert (whole.migrated, whole.gaps) == (1, 0)
    gap = check([*history(right(text=TEXT[:8] + TEXT[12:])), resumed])
    assert (gap.migrated, gap.gaps, gap.spliced) == (0, 1, 1)
    assert check([*history(right()), log_entry("stream_resumed", 10.5, delivered=0)]).migrated == 0


def test_deadlines_and_aborts_have_limits() -> None:
    """Without a fault, the error of a deadline comes soon, and an engine soon stops when its client leaves."""
    late = right(deadline_s=0.3, sent_s=5.0, end="error", code="deadline_exceeded", status=504, text="")
    assert broken(history(late)) == ["deadline"]
    assert broken(history(late, (Kind.KILL_WORKER, 6.0, 7.0))) == []
    left = right(end="left", text=TEXT[:8])
    assert broken([*history(left), log_entry("job_aborted", 11.5)]) == []
    assert broken([*history(left), log_entry("job_aborted", 13.5)]) == ["cancel"]


def test_dead_letters_are_poison_within_its_bound() -> None:
    """Another's, or one with more starts than allowed, is a violation."""

    def dead_letter(attempts: int) -> Entry:
        fields = {"request_id": "chaos-7", "attempts": attempts, "allowed": MAX_ATTEMPTS, "cause": "it crashed"}
        return {"t": 20.0, "what": "dead_letter", **fields}

    poison = history(right(**(GIVEN_UP | {"kind": "poison"})))
    assert broken([*poison, dead_letter(MAX_ATTEMPTS)]) == []
    assert broken([*poison, dead_letter(MAX_ATTEMPTS + 1)]) == ["poison bound"]
    assert broken([*history(right()), dead_letter(MAX_ATTEMPTS)]) == ["poison bound"]


def test_what_is_left_over_and_what_was_never_seen_is_reported() -> None:
    """A queue that is not empty, jobs that never ended, secrets in a log, a run in which nothing was ever fenced."""
    ended = dict.fromkeys(("done", "failed", "cancelled", "expired", "dead"), 1)
    entries: list[Entry] = [
        *history(right()),
        {"t": 20.0, "what": "final", "left": {"budget": {"t:acme:jobs": 1}}},
        {"t": 20.0, "what": "canaries", "seen": ["the log of router"]},
        {"t": 20.0, "what": "counts", "counts": {"fenced": 0, "recovered": 3, "enqueued": 6, **ended}},
    ]
    verdict = check(entries, must_prove=("fenced", "recovered"))
    assert [violation.promise for violation in verdict.violations] == [
        "nothing is left behind",
        "isolation",
        "conservation",
        "the run proves something",
    ]
    assert "| FENCED | 0 |" in table(verdict, "by hand")


def test_a_violation_is_described_by_its_own_request_and_nothing_else() -> None:
    """It has the request, the faults at that time and the log lines about it, and no others."""
    entries = [
        *history(right(end="silent"), (Kind.KILL_WORKER, 9.0, 9.5), (Kind.KILL_REDIS, 30.0, 31.0)),
        log_entry("job_released", 10.5),
        log_entry("job_released", 10.5) | {"request_id": "chaos-8", "role": "worker-2"},
    ]
    text = describe_violations(check(entries), entries)
    assert Kind.KILL_WORKER in text
    assert "job_released" in text
    assert Kind.KILL_REDIS not in text
    assert "chaos-8" not in text


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_is_its_seed(seed: int) -> None:
    """Drawn again it is the same, in order of time, within the run; one that is long enough has every kind of fault."""
    plan = draw(seed, 60)
    assert plan == draw(seed, 60)
    assert [fault.at_s for fault in plan] == sorted(fault.at_s for fault in plan)
    assert all(0 <= fault.at_s <= 60 for fault in plan)
    assert {fault.kind for fault in (*opening(seed, 60), *plan)} == set(Kind)
    strikes = [fault for fault in plan if fault.kind is Kind.STRIKE_WORKER]
    assert {fault.call for fault in strikes} == {"claim", "publish", "settle"}
    assert {fault.point for fault in strikes} == set(Point)
    workers = [fault.target for fault in opening(seed, 60) if "worker" in fault.kind]
    assert len(set(workers)) == len(workers)
