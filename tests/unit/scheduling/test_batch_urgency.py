"""How urgent the lines of a batch are, alone and among other batches on one queue."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from queue_schemas.lanes import BANDS, DEFAULT_BAND, Lane, band_order, lane_order
from scheduling.batch_urgency import (
    ENTER_LOAD,
    MIN_EVIDENCE_S,
    BatchNeed,
    Urgency,
    UrgencyState,
    need_of,
    next_state,
    place_of,
)

WINDOW = 64


@dataclass
class Batch:
    """A batch with a window of lines on the queue; ``done_at`` is when its last line was answered."""

    total: int
    deadline_s: float
    begins_s: float = 0.0
    sent: int = 0
    done: int = 0
    done_at: float | None = None
    state: UrgencyState = field(default_factory=UrgencyState)
    history: list[Urgency] = field(default_factory=list)


class Queue:
    """The queue's lanes and bands, with ``rate`` claims a second, each answered at once, and maybe endless interactive
    work. ``adapts``: whether batches are urgent at all."""

    def __init__(self, batches: list[Batch], rate: int, *, interactive: bool = False, adapts: bool = True) -> None:
        self.batches, self.rate, self.interactive, self.adapts = batches, rate, interactive, adapts
        self.waiting: dict[tuple[Lane, int], deque[tuple[Batch, int]]] = {
            (lane, band): deque() for lane in (Lane.BACKGROUND, Lane.BATCH) for band in range(BANDS)
        }
        self.turn = self.second = 0
        self.turns: dict[Lane, int] = dict.fromkeys(Lane, 0)
        self.interactive_claims = 0

    def run(self, seconds: int) -> None:
        for second in range(self.second, self.second + seconds):
            self.second = second + 1
            before = [batch.done for batch in self.batches]
            for _ in range(self.rate):
                self._refill(second)
                self._claim(second)
            for batch, done in zip(self.batches, before, strict=True):
                if self.adapts and batch.begins_s <= second < batch.deadline_s and batch.done < batch.total:
                    self._decide(batch, batch.done - done, second)

    def _refill(self, second: int) -> None:
        for batch in self.batches:
            while batch.begins_s <= second and batch.sent < batch.total and batch.sent - batch.done < WINDOW:
                self._put(batch, batch.sent)
                batch.sent += 1

    def _put(self, batch: Batch, line: int) -> None:
        urgency = batch.state.urgency if self.adapts else Urgency.NORMAL
        self.waiting[place_of(urgency, line)].append((batch, line))

    def _claim(self, second: int) -> None:
        turn, self.turn = self.turn, self.turn + 1
        for lane in lane_order(turn):
            if lane is Lane.INTERACTIVE:
                if self.interactive:
                    self.interactive_claims += 1
                    return
                continue
            for band in band_order(self.turns[lane]):
                if self.waiting[lane, band]:
                    batch, _ = self.waiting[lane, band].popleft()
                    self.turns[lane] += 1
                    batch.done += 1
                    batch.done_at = second if batch.done == batch.total else None
                    return

    def _decide(self, batch: Batch, answered: int, now_s: float) -> None:
        before = batch.state.urgency
        needs = (need_at(other, now_s) for other in self.batches if other is not batch and other.begins_s <= now_s)
        batch.state = next_state(
            batch.state,
            [need for need in needs if need is not None],
            answered=answered,
            elapsed_s=1.0,
            remaining=batch.total - batch.done,
            deadline_s=batch.deadline_s,
            now_s=now_s,
        )
        batch.history.append(batch.state.urgency)
        if batch.state.urgency > before:
            for waiting in self.waiting.values():
                for _ in range(len(waiting)):
                    owner, line = waiting.popleft()
                    if owner is batch:
                        self._put(batch, line)
                    else:
                        waiting.append((owner, line))


def need_at(batch: Batch, now_s: float) -> BatchNeed | None:
    if batch.done == batch.total or now_s >= batch.deadline_s:
        return None
    return need_of(batch.state, remaining=batch.total - batch.done, deadline_s=batch.deadline_s, now_s=now_s)


def late(batch: Batch) -> bool:
    return batch.done_at is None or batch.done_at > batch.deadline_s


def test_a_batch_with_a_near_deadline_ends_in_time_behind_a_saturating_one() -> None:
    """Sharing evenly it would be late; the earlier batch keeps its share meanwhile."""
    outcomes = []
    for adapts in (False, True):
        long, short = Batch(100_000, 86_400.0), Batch(800, 160.0, begins_s=60)
        queue = Queue([long, short], 10, adapts=adapts)
        queue.run(60)
        before = long.done
        while short.done < short.total and queue.second < 160:
            queue.run(1)
        outcomes.append((late(short), (long.done - before) / (queue.second - 60)))
    (without, _), (with_urgency, floor_per_s) = outcomes
    assert (without, with_urgency) == (True, False)
    assert floor_per_s >= 10 / 32


def test_a_batch_without_slack_takes_both_lanes_behind_endless_interactive_work() -> None:
    """Two of 16 claims in place of one, and no more: the bound that interactive latency sets."""
    for adapts in (False, True):
        batch = Batch(300, 200.0)
        queue = Queue([batch], 16, interactive=True, adapts=adapts)
        queue.run(200)
        assert late(batch) is not adapts
        assert queue.interactive_claims >= 14 / 16 * queue.turn


def test_earlier_deadlines_go_first_and_all_are_met() -> None:
    """Four batches that fill the time until the last deadline: equal shares would miss the first two."""
    for adapts in (False, True):
        batches = [Batch(500, deadline) for deadline in (70.0, 130.0, 190.0, 250.0)]
        Queue(batches, 10, adapts=adapts).run(250)
        assert any(map(late, batches)) is not adapts


def test_a_batch_that_cannot_end_in_time_gives_way() -> None:
    """It keeps its share, and one that can make it does."""
    hopeless, feasible = Batch(50_000, 300.0), Batch(1_200, 300.0)
    Queue([hopeless, feasible], 10).run(300)
    assert not late(feasible)
    assert hopeless.state.hopeless
    assert hopeless.done >= 300


def test_batches_with_time_to_spare_share_evenly() -> None:
    """None of them is hurried, however long the others are."""
    batches = [Batch(total, 86_400.0) for total in (100_000, 5_000, 20_000)]
    Queue(batches, 10).run(300)
    assert [batch.state.urgency for batch in batches] == [Urgency.NORMAL] * 3
    assert min(batch.done for batch in batches) >= 0.8 * max(batch.done for batch in batches)


def decided(state: UrgencyState, *, answered: int = 0, elapsed_s: float, remaining: int, left_s: float) -> UrgencyState:
    """One decision of a batch that is alone."""
    return next_state(state, answered=answered, elapsed_s=elapsed_s, remaining=remaining, deadline_s=left_s, now_s=0.0)


def test_nothing_is_known_before_there_is_evidence() -> None:
    """A new batch is neither late nor has it time to spare: its first lines go before those of others."""
    state = decided(UrgencyState(), elapsed_s=MIN_EVIDENCE_S / 2, remaining=10**6, left_s=1)
    assert state.urgency is Urgency.SOON
    assert need_of(state, remaining=1, deadline_s=1, now_s=0) is None


def test_long_lines_are_not_late_before_the_first_can_have_ended() -> None:
    """100 lines of five minutes each and a day for them: nothing answered for five minutes is no alarm."""
    state = UrgencyState()
    for second in range(290):
        state = decided(state, elapsed_s=1, remaining=100, left_s=86_400 - second)
        assert state.urgency <= Urgency.SOON


def test_no_answers_at_all_make_a_batch_late_in_time() -> None:
    """While there is time left to use the other lane."""
    state, late_at = UrgencyState(), None
    for second in range(600):
        state = decided(state, elapsed_s=1, remaining=20, left_s=600 - second)
        if state.urgency is Urgency.LATE:
            late_at = second
            break
    assert late_at is not None
    assert late_at <= 300


def test_a_slow_beginning_is_no_reason_to_give_way() -> None:
    """What a batch reaches in both lanes is known only after a while there."""
    state = UrgencyState()
    for second in range(5):
        state = decided(state, elapsed_s=1, remaining=300, left_s=40 - second)
    assert state.urgency is Urgency.LATE
    for second in range(5, 10):
        state = decided(state, answered=16, elapsed_s=1, remaining=300 - 16 * (second - 4), left_s=40 - second)
        assert state.urgency is Urgency.LATE


def test_one_that_gave_way_is_tried_again() -> None:
    """Workers may have come, or others gone: nothing tells it from its share behind the others."""
    state, seen = UrgencyState(Urgency.LATE, lines=1.0, seconds=10.0), []
    for second in range(900):
        state = decided(state, answered=second % 2, elapsed_s=1, remaining=10_000, left_s=1_000 - second)
        seen.append(state.hopeless)
    changes = sum(before != after for before, after in pairwise(seen))
    assert not seen[0]
    assert changes >= 2, "it gave way, and was tried again"
    assert 0.5 < sum(seen) / len(seen) < 0.9


@pytest.mark.parametrize("level", list(Urgency)[1:])
def test_an_urgency_is_not_lost_at_the_mark_where_it_began(level: Urgency) -> None:
    """Only at half of it, and one at a time: what made the batch faster must not be taken away at once."""
    enter = ENTER_LOAD[level]
    at = UrgencyState(level, lines=100.0, seconds=100.0)
    for load, expected in ((enter * 0.6, level), (enter * 0.4, level - 1), (0.0, level - 1)):
        state = decided(at, elapsed_s=0, remaining=int(load * 10_000), left_s=10_000)
        assert state.urgency == expected


def test_only_the_first_of_those_with_short_slack_takes_both_lanes() -> None:
    """The next goes before the rest, and the rest shares. One that gives way is not in anybody's way."""
    late_one = UrgencyState(Urgency.LATE, lines=100.0, seconds=100.0)

    def beside(*others: BatchNeed) -> Urgency:
        state = next_state(late_one, others, answered=0, elapsed_s=0, remaining=9_900, deadline_s=10_000, now_s=0)
        return state.urgency

    earlier, earliest = BatchNeed(9_000, 100, 1.0, 0.3), BatchNeed(8_000, 100, 1.0, 0.9)
    assert beside() is Urgency.LATE
    assert beside(BatchNeed(11_000, 100, 1.0, 0.9)) is Urgency.LATE
    assert beside(earlier) is Urgency.SOON
    assert beside(earlier, earliest) is Urgency.NORMAL
    assert beside(replace(earlier, load=0.2), replace(earliest, hopeless=True)) is Urgency.LATE


@given(
    st.lists(
        st.tuples(st.integers(0, 1000), st.floats(0, 60), st.integers(0, 10**6), st.floats(-100, 10**6)), max_size=40
    ),
    st.integers(0, 10**6),
)
def test_every_line_has_a_place_whatever_is_observed(seen: list[tuple[int, float, int, float]], line: int) -> None:
    """In the batch lane, or in the middle of the background lane; never among interactive requests."""
    state = UrgencyState()
    for answered, elapsed_s, remaining, left_s in seen:
        state = decided(state, answered=answered, elapsed_s=elapsed_s, remaining=remaining, left_s=left_s)
        lane, band = place_of(state.urgency, line)
        assert (lane is Lane.BATCH and 0 <= band < BANDS) or (lane, band) == (Lane.BACKGROUND, DEFAULT_BAND)
        assert state.lines >= 0
        assert state.seconds >= 0


def test_more_urgent_lines_are_never_placed_later() -> None:
    """Level by level the band rises, and in the end a lane."""
    places = [place_of(level, 0) for level in Urgency]
    assert places == [(Lane.BATCH, 2), (Lane.BATCH, 1), (Lane.BATCH, 0), (Lane.BACKGROUND, DEFAULT_BAND)]
    assert place_of(Urgency.LATE, 1) == (Lane.BATCH, 0)
