"""What the clients of a run noticed, step by step, as a table for people."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.support.sockets import Held
from tests.support.traffic import Asked, Outcome, Traffic, is_excused

_HEAD = (
    "step",
    "at s",
    "requests",
    "streams across",
    "failed",
    "excused",
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
    asked: Sequence[Asked]
    streams_across: int
    excused: int

    def count(self, outcome: Outcome) -> int:
        return Counter(asked.outcome for asked in self.asked)[outcome]

    def row(self) -> tuple[str, ...]:
        silences = sorted(asked.max_silence_s * 1000 for asked in self.asked if asked.outcome is Outcome.RIGHT)
        failed = self.count(Outcome.FAILED) + self.count(Outcome.UNANSWERED) - self.excused
        numbers = (len(self.asked), self.streams_across, failed, self.excused)
        wrong = (self.count(Outcome.MIXED_UP), self.count(Outcome.BROKEN))
        times = (f"{silences[len(silences) // 2]:.0f}", f"{silences[-1]:.0f}") if silences else ("", "")
        return (self.name, f"{self.at_s:.1f}", *map(str, numbers), *map(str, wrong), *times)


def steps_of(traffic: Traffic, excused: Iterable[Held] = ()) -> list[Step]:
    """The history of ``traffic`` divided by its steps."""
    given = tuple(excused)
    begin = traffic.steps[0][0]
    ends = [at for at, _ in traffic.steps[1:]] + [time.monotonic()]
    found = []
    for (at, name), end in zip(traffic.steps, ends, strict=True):
        # What ends after the last step's mark is the last step's, which lasts until all is answered.
        asked = [one for one in traffic.history if at <= one.end_s < end]
        across = sum(one.kind.stream and one.begin_s < at < one.end_s for one in traffic.history)
        found.append(Step(name, at - begin, asked, across, sum(is_excused(one, given) for one in asked)))
    return found


def table(steps: Sequence[Step]) -> str:
    """Markdown. Times are of answers that were right: the longest silence within each, its first token included."""
    rows = [_HEAD, tuple("---" for _ in _HEAD), *(step.row() for step in steps)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
