"""What the clients of a run noticed, step by step, as a table for people."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.support.sockets import Held
from tests.support.traffic import Outcome, SentRequest, Traffic, is_expected_failure

_HEAD = (
    "step",
    "at s",
    "requests",
    "streams across",
    "failed",
    "expected",
    "mixed up",
    "broken",
    "p50 ms",
    "longest ms",
)


@dataclass(frozen=True, slots=True)
class Step:
    """One step: the requests that ended in it, and how many streams were under way when it began."""

    name: str
    at_s: float
    sent: Sequence[SentRequest]
    streams_across: int
    expected: int

    def count(self, outcome: Outcome) -> int:
        return Counter(sent.outcome for sent in self.sent)[outcome]

    def row(self) -> tuple[str, ...]:
        silences = sorted(sent.max_silence_s * 1000 for sent in self.sent if sent.outcome is Outcome.RIGHT)
        failed = self.count(Outcome.FAILED) + self.count(Outcome.UNANSWERED) - self.expected
        numbers = (len(self.sent), self.streams_across, failed, self.expected)
        wrong = (self.count(Outcome.MIXED_UP), self.count(Outcome.BROKEN))
        times = (f"{silences[len(silences) // 2]:.0f}", f"{silences[-1]:.0f}") if silences else ("", "")
        return (self.name, f"{self.at_s:.1f}", *map(str, numbers), *map(str, wrong), *times)


def steps_of(traffic: Traffic, expected: Iterable[Held] = ()) -> list[Step]:
    """The history of ``traffic`` divided by its steps."""
    known = tuple(expected)
    begin = traffic.steps[0][0]
    ends = [at for at, _ in traffic.steps[1:]] + [time.monotonic()]
    found = []
    for (at, name), end in zip(traffic.steps, ends, strict=True):
        # What ends after the last step's mark is the last step's, which lasts until all is answered.
        sent = [one for one in traffic.history if at <= one.end_s < end]
        across = sum(one.kind.stream and one.begin_s < at < one.end_s for one in traffic.history)
        found.append(Step(name, at - begin, sent, across, sum(is_expected_failure(one, known) for one in sent)))
    return found


def table(steps: Sequence[Step]) -> str:
    """Markdown. Times are of answers that were right: the longest silence within each, its first token included."""
    rows = [_HEAD, tuple("---" for _ in _HEAD), *(step.row() for step in steps)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
