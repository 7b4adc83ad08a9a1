"""The judge is judged: histories made by hand, each with one thing wrong, or with an explanation."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from tests.support.traffic import cells_of
from worker.engines.simulated import chat_prompt
from worker.engines.simulated.tokens import count_tokens

from .check import AFTERMATH_S, check
from .history import Request
from .plan import Kind, draw
from .report import story, table

TEXT = cells_of(7, 8)
PROMPT_TOKENS = count_tokens(chat_prompt([("user", TEXT)]))


def right(**changes: Any) -> Request:
    """A stream that was answered as it should be."""
    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 8, "total_tokens": PROMPT_TOKENS + 8}
    fields: dict[str, Any] = {
        "number": 7, "kind": "chat stream", "router": 0, "cells": 8, "begun_s": 10.0, "end": "answered",
        "ended_s": 11.0, "status": 200, "text": TEXT, "ids": ["a"], "roles": 1, "finishes": ["stop"], "done": 1,
        "usage": usage, "usages": 1,
    }  # fmt: skip
    return Request(**(fields | changes))


def history(request: Request, *faults: tuple[Kind, float, float], **more: Any) -> list[dict[str, Any]]:
    """A history of one request and some faults (kind, begin, end)."""
    entries: list[dict[str, Any]] = []
    for number, (kind, begin_s, end_s) in enumerate(faults):
        entries.append({"t": begin_s, "what": "fault", "number": number, "kind": kind, "target": more.get("target", 0)})
        entries.append({"t": end_s, "what": "healed", "number": number})
    return [*entries, {"t": request.ended_s, "what": "request", **asdict(request)}]


def test_a_right_answer_is_completed() -> None:
    """Nothing is wrong with it."""
    verdict = check(history(right()))
    assert (verdict.acknowledged, verdict.completed, verdict.violations) == (1, 1, [])


@pytest.mark.parametrize(
    ("changes", "promise"),
    [
        ({"text": TEXT[:-4]}, "no loss"),
        ({"text": TEXT[:8] + TEXT[12:]}, "no splice"),
        ({"text": TEXT[:8] + TEXT[4:]}, "no duplicate"),
        ({"text": TEXT[:8] + cells_of(8, 8)[8:]}, "no splice"),
        ({"text": TEXT[:8] + cells_of(8, 1), "end": "error", "code": "x"}, "no splice"),
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
def test_each_wrong_is_seen(changes: dict[str, Any], promise: str) -> None:
    """By the promise that it breaks, with its story."""
    entries = history(right(**changes))
    verdict = check(entries)
    assert [violation.promise for violation in verdict.violations] == [promise]
    assert "VIOLATION" in story(verdict, entries)


@pytest.mark.parametrize(
    ("changes", "fault", "why"),
    [
        ({"end": "cut", "text": TEXT[:8]}, Kind.KILL_ROUTER, "its router was killed"),
        ({"end": "error", "status": 503, "text": ""}, Kind.KILL_REDIS, "refused while the queue was away"),
        ({"kind": "deadline", "end": "error", "status": 504, "text": ""}, Kind.KILL_WORKER, "its own deadline"),
        ({"kind": "malformed", "end": "error", "status": 400, "text": ""}, Kind.KILL_WORKER, "malformed, refused"),
        ({"end": "left", "text": TEXT[:8]}, Kind.KILL_WORKER, "the client left"),
    ],
)
def test_what_a_fault_explains_is_no_violation(changes: dict[str, Any], fault: Kind, why: str) -> None:
    """As long as that fault was there, and for a while after it."""
    verdict = check(history(right(**changes), (fault, 9.0, 9.5)))
    assert (dict(verdict.explained), verdict.violations) == ({why: 1}, [])


def test_a_fault_explains_nothing_long_after_it_or_elsewhere() -> None:
    """Another Router's death, or one that was long over, does not excuse a broken connection."""
    cut = right(end="cut", text="")
    assert check(history(cut, (Kind.KILL_ROUTER, 1.0, 9.9 - AFTERMATH_S))).violations
    assert check(history(cut, (Kind.KILL_ROUTER, 9.0, 9.5), target=1)).violations


def test_what_is_left_over_and_what_was_never_seen_is_told() -> None:
    """A queue that is not empty at the end, or a run in which nothing was ever fenced, is no proof."""
    entries = [
        *history(right()),
        {"t": 20.0, "what": "final", "left": {"budget": {"t:acme:jobs": 1}}},
        {"t": 20.0, "what": "counts", "counts": {"fenced": 0, "recovered": 3}},
    ]
    verdict = check(entries, must_prove=("fenced", "recovered"))
    assert [violation.promise for violation in verdict.violations] == [
        "nothing is left behind",
        "the run proves something",
    ]
    assert "| FENCED | 0 |" in table(verdict, "by hand")


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_is_its_seed(seed: int) -> None:
    """Drawn again it is the same, in order of time, within the run; one that is long enough has every usual fault."""
    plan = draw(seed, 60)
    assert plan == draw(seed, 60)
    assert [fault.at_s for fault in plan] == sorted(fault.at_s for fault in plan)
    assert all(2 <= fault.at_s <= 58 for fault in plan)
    assert {Kind.KILL_WORKER, Kind.KILL_REDIS, Kind.LOSE_REPLIES, Kind.PAUSE_WORKER} <= {fault.kind for fault in plan}
