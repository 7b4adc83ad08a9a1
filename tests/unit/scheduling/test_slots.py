"""How many slots a worker keeps, by its engine's readings."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.slots import (
    CLEAN_READINGS,
    IDLE_READINGS,
    KV_FULL,
    KV_ROOM,
    MISSES_ALLOWED,
    EngineLoad,
    SlotBounds,
    SlotState,
    asks_now,
    first_state,
    next_state,
)

BOUNDS = SlotBounds(setting=64, maximum=64)
WIDE = SlotBounds(setting=8, maximum=256)
STEPS_PER_READING = 10


@dataclass
class ToyEngine:
    """``capacity`` requests run, the rest wait in order. A request holds 1 unit of ``kv`` when it starts and as much
    as ``weight`` when it ends; when they do not fit, the youngest waits again and starts anew."""

    capacity: int
    random: Random
    mean_steps: float
    kv: float = 1e9
    weight: float = 1.0
    now: int = 0
    preempted: int = 0
    done: dict[int, int] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    running: list[tuple[int, int, int]] = field(default_factory=list)
    """(ends at, began at, worker), a heap."""

    def send(self, worker: int) -> None:
        self.waiting.append(worker)

    def end(self) -> None:
        self.now += 1
        while self.running and self.running[0][0] <= self.now:
            _, _, worker = heapq.heappop(self.running)
            self.done[worker] = self.done.get(worker, 0) + 1

    def start(self) -> None:
        used = self.used  # kept up to date: adding it up for each request would make this the longest of all tests
        while self.waiting and len(self.running) < self.capacity and used + 1 <= self.kv:
            length = max(1, round(self.random.expovariate(1 / self.mean_steps)))
            heapq.heappush(self.running, (self.now + length, self.now, self.waiting.pop(0)))
            used += 1
        while used > self.kv and len(self.running) > 1:
            youngest = max(self.running, key=lambda run: run[1])
            self.running.remove(youngest)
            heapq.heapify(self.running)
            self.waiting.insert(0, youngest[2])
            used -= self._held(youngest)
            self.preempted += 1

    @property
    def used(self) -> float:
        return sum(map(self._held, self.running))

    def _held(self, run: tuple[int, int, int]) -> float:
        ends, began, _ = run
        return 1 + (self.weight - 1) * (self.now - began) / (ends - began)

    def load(self) -> EngineLoad:
        kv_usage = min(self.used / self.kv, 1.0)
        return EngineLoad(len(self.waiting), len(self.running), kv_usage, self.preempted)


class Fleet:
    """Workers with an endless backlog on one engine."""

    def __init__(self, engine: ToyEngine, bounds: SlotBounds, workers: int = 1, *, adapts: bool = True) -> None:
        self.engine, self.bounds, self.adapts = engine, bounds, adapts
        self.states = [first_state(bounds) for _ in range(workers)]
        self.sent = [0] * workers
        self.limits: list[list[int]] = []
        self.waited: list[int] = []

    def run(self, readings: int) -> None:
        for _ in range(readings):
            for _ in range(STEPS_PER_READING):
                self.engine.end()
                for worker, state in enumerate(self.states):
                    for _ in range(state.limit - self.busy(worker)):
                        self.sent[worker] += 1
                        self.engine.send(worker)
                self.engine.start()
            load = self.engine.load()
            self.waited.append(load.waiting)
            if self.adapts:
                self.states = [
                    next_state(state, self.bounds, load, busy=self.busy(worker), all_in_use=True)
                    for worker, state in enumerate(self.states)
                ]
            self.limits.append([state.limit for state in self.states])

    def busy(self, worker: int) -> int:
        return self.sent[worker] - self.engine.done.get(worker, 0)


@settings(deadline=None, max_examples=30)
@given(capacity=st.integers(1, 60), mean_steps=st.floats(3, 100), seed=st.integers(0, 10_000))
def test_the_limit_settles_at_what_the_engine_runs(capacity: int, mean_steps: float, seed: int) -> None:
    """Whatever its capacity and the length of requests: nearly nothing waits inside, and nearly nothing stays idle."""
    fleet = Fleet(ToyEngine(capacity, Random(seed), mean_steps), BOUNDS)
    fleet.run(60 + int(2 * 64 * mean_steps / STEPS_PER_READING / capacity))  # what was sent at first must end
    fleet.waited.clear()
    fleet.limits.clear()
    fleet.run(200)
    limits = [limit for (limit,) in fleet.limits]
    assert sum(fleet.waited) / 200 <= 1.0
    assert sum(limits) / 200 >= capacity - 1
    assert min(limits) >= capacity * 0.8 - 1
    assert max(limits) <= capacity + 2


@pytest.mark.parametrize("capacity", [16, 100, 200])
def test_throughput_stays_while_the_engines_queue_drains(capacity: int) -> None:
    """As many requests end as with a limit far above the capacity."""
    fixed = Fleet(ToyEngine(capacity, Random(1), 30), SlotBounds(256, 256), adapts=False)
    adaptive = Fleet(ToyEngine(capacity, Random(1), 30), SlotBounds(256, 256))
    for fleet in (fixed, adaptive):
        fleet.run(200)
    assert sum(adaptive.engine.done.values()) >= 0.97 * sum(fixed.engine.done.values())
    assert fixed.waited[-1] == 256 - capacity
    assert max(adaptive.waited[100:]) <= 2


def test_it_grows_to_an_engine_with_more_room_than_the_setting() -> None:
    """Up to the maximum, in seconds and not in minutes."""
    fleet = Fleet(ToyEngine(200, Random(2), 30), WIDE)
    fleet.run(60)
    assert 195 <= fleet.limits[-1][0] <= 203
    roomy = Fleet(ToyEngine(1_000, Random(2), 30), WIDE)
    roomy.run(60)
    assert roomy.limits[-1][0] == WIDE.maximum


def test_it_follows_an_engine_whose_capacity_changes() -> None:
    """Down within a few readings; up again, too, although it had backed off."""
    fleet = Fleet(ToyEngine(50, Random(3), 20), BOUNDS)
    fleet.run(100)
    fleet.engine.capacity = 10
    fleet.run(30)
    assert fleet.limits[-1][0] <= 12
    fleet.run(100)
    fleet.engine.capacity = 50
    fleet.run(60)
    assert fleet.limits[-1][0] >= 48


@settings(deadline=None, max_examples=15)
@given(kv=st.integers(40, 100), weight=st.floats(1.5, 6), seed=st.integers(0, 1_000))
def test_a_full_kv_cache_is_not_thrashed(kv: int, weight: float, seed: int) -> None:
    """Where memory is the bound, far fewer requests are computed again, and nearly as many end: 85 %, or one slot less
    of an engine that has few."""
    outcomes, steps = [], 20
    for adapts in (False, True):
        fleet = Fleet(ToyEngine(1_000, Random(seed), steps, kv, weight), SlotBounds(120, 120), adapts=adapts)
        fleet.run(120)
        preempted, done = fleet.engine.preempted, sum(fleet.engine.done.values())
        fleet.waited.clear()
        fleet.run(150)
        outcomes.append((fleet.engine.preempted - preempted, sum(fleet.engine.done.values()) - done, fleet.waited))
    (fixed, fixed_done, fixed_waited), (adaptive, adaptive_done, waited) = outcomes
    assert adaptive <= 0.2 * fixed + 10
    assert adaptive_done >= 0.85 * fixed_done - 150 * STEPS_PER_READING / steps
    assert sum(waited) <= 0.05 * sum(fixed_waited)


def test_workers_of_one_engine_share_its_capacity() -> None:
    """Each answers for its part of what waits: together they neither starve nor flood it."""
    fleet = Fleet(ToyEngine(48, Random(5), 30), BOUNDS, workers=3)
    fleet.run(100)
    assert all(45 <= sum(limits) <= 51 for limits in fleet.limits[30:])
    assert max(fleet.waited[30:]) <= 3


def test_a_burst_that_waits_for_one_reading_changes_nothing() -> None:
    """Requests wait for a moment when they arrive; only a queue that stands is one."""
    state = first_state(BOUNDS)
    for waiting in (40, 0, 40, 0):
        state = next_state(state, BOUNDS, EngineLoad(waiting, 10), busy=50, all_in_use=True)
        assert state.limit == BOUNDS.setting


def test_a_decrease_is_not_repeated_while_it_takes_effect() -> None:
    """48 wait behind 16 that run: the limit is 16 at once, and stays it while the 48 move up."""
    state = first_state(BOUNDS)
    for done in range(0, 48, 2):
        state = next_state(state, BOUNDS, EngineLoad(48 - done, 16), busy=64 - done, all_in_use=True)
        assert state.limit == (16 if done else 64)


def test_a_limit_that_is_not_used_does_not_grow() -> None:
    """Without demand nothing is learned of the engine's room."""
    state = first_state(WIDE)
    for _ in range(50):
        state = next_state(state, WIDE, EngineLoad(0, 3, 0.1), busy=3, all_in_use=False)
    assert state.limit == WIDE.setting


def test_a_limit_below_the_setting_grows_back_without_being_used_up() -> None:
    """New work goes to workers with more free slots: one that was cut to a few would never have all of them in use."""
    state = SlotState(2)
    for _ in range(50):
        state = next_state(state, WIDE, EngineLoad(0, 1, 0.1), busy=1, all_in_use=False)
    assert state.limit == WIDE.setting


def test_a_limit_that_binds_nobody_is_back_within_seconds() -> None:
    """One long prompt takes all of an engine's steps, so that a second request waits: the limit is 1. Once it is over,
    the worker must not stay without the work that its cache is warm for."""
    bounds = SlotBounds(32, 32)
    state = first_state(bounds)
    for _ in range(2):
        state = next_state(state, bounds, EngineLoad(1, 1, 0.25), busy=2, all_in_use=False)
    assert state.limit == 1
    readings = 0
    while state.limit < bounds.setting:
        state = next_state(state, bounds, EngineLoad(0, 0, 0.0), busy=0, all_in_use=False)
        readings += 1
    assert readings <= 12


def test_a_limit_that_is_used_up_is_probed_and_not_doubled() -> None:
    """An engine that is full of 16 requests must not be sent 16 more at once."""
    state, limits = SlotState(16, overloaded=True), [16]
    for _ in range(8):
        state = next_state(state, BOUNDS, EngineLoad(0, 16, 0.1), busy=state.limit, all_in_use=True)
        limits.append(state.limit)
    assert max(after - before for before, after in pairwise(limits)) <= 6


def test_a_limit_doubles_until_the_first_sign_of_overload() -> None:
    """And only while the KV cache has room for twice as much; then it is probed."""
    bounds = SlotBounds(16, 256)

    def grown(kv_usage: float | None, state: SlotState) -> list[int]:
        limits = []
        for _ in range(8):
            state = next_state(state, bounds, EngineLoad(0, 16, kv_usage), busy=state.limit, all_in_use=True)
            limits.append(state.limit)
        return limits

    assert grown(0.1, first_state(bounds)) == [16, 32, 32, 64, 64, 128, 128, 256]
    assert max(grown(0.5, first_state(bounds))) < 32
    assert max(grown(None, first_state(bounds))) < 32
    state = next_state(first_state(bounds), bounds, EngineLoad(0, 16, 0.99), busy=16, all_in_use=True)
    assert state.limit == 15
    assert max(grown(0.1, state)) < 32


def test_after_a_doubling_it_is_probed_by_ones() -> None:
    """Where the KV cache has no room for another one."""
    state, bounds, limits = SlotState(32), SlotBounds(32, 256), []
    for kv_usage in (0.1, 0.1, 0.5, 0.5, 0.5, 0.5):
        state = next_state(state, bounds, EngineLoad(0, 16, kv_usage), busy=state.limit, all_in_use=True)
        limits.append(state.limit)
    assert limits == [32, 64, 64, 65, 65, 67]


def test_missing_readings_do_not_let_it_forget_an_overload() -> None:
    """An engine that answers late is often one that has too much to do."""
    state, bounds = SlotState(64, overloaded=True, backoff=3), SlotBounds(16, 256)
    for _ in range(MISSES_ALLOWED + 1):
        state = next_state(state, bounds, None, busy=16, all_in_use=True)
    assert (state.limit, state.overloaded, state.backoff) == (16, True, 3)


@pytest.mark.parametrize(
    ("limit", "missed", "busy", "passed", "asks"),
    [
        (WIDE.setting, 0, 1, 1, True),
        (WIDE.setting, 0, 0, 1, False),
        (WIDE.setting, 0, 0, IDLE_READINGS, True),
        (WIDE.setting - 1, 0, 0, 1, True),
        (WIDE.setting, MISSES_ALLOWED + 1, 1, 1, False),
        (WIDE.setting, MISSES_ALLOWED + 1, 1, IDLE_READINGS, True),
    ],
)
def test_an_engine_is_asked_seldom_where_nothing_follows(
    limit: int, missed: int, busy: int, passed: int, asks: bool
) -> None:
    """An idle one, unless its limit is to grow back; and one that tells no load."""
    assert asks_now(SlotState(limit, missed=missed), WIDE, busy=busy, passed=passed) is asks


def test_a_limit_does_not_grow_into_a_cache_that_fills_up() -> None:
    """Between the two marks of the KV cache it rests."""
    state = first_state(WIDE)
    for _ in range(50):
        state = next_state(state, WIDE, EngineLoad(0, 8, (KV_ROOM + KV_FULL) / 2), busy=8, all_in_use=True)
    assert state.limit == WIDE.setting


def test_a_preemption_lowers_the_limit_once() -> None:
    """The counter's growth counts, from the second reading; an engine that restarts counts from 0 again."""
    state = first_state(BOUNDS)
    limits = []
    for total in (100, 100, 101, 101, 0, 0, 1):
        busy = min(state.limit, 60)
        state = next_state(state, BOUNDS, EngineLoad(0, 60, 0.9, total), busy=busy, all_in_use=True)
        limits.append(state.limit)
    assert limits == [64, 64, 54, 54, 54, 54, 48]


def test_missing_readings_bring_the_setting_back() -> None:
    """After a few in a row, also from above it."""
    for limit in (3, 200):
        state = SlotState(limit)
        for missed in range(MISSES_ALLOWED + 2):
            state = next_state(state, WIDE, None, busy=3, all_in_use=True)
            assert state.limit == (limit if missed < MISSES_ALLOWED else WIDE.setting)


loads = st.none() | st.builds(
    EngineLoad,
    waiting=st.integers(0, 10**6),
    running=st.none() | st.integers(0, 10**6),
    kv_usage=st.none() | st.floats(0, 1),
    preemptions=st.none() | st.integers(0, 2**53),
)


@given(st.lists(st.tuples(loads, st.integers(0, 400), st.booleans()), max_size=60), st.integers(1, 300))
def test_the_limit_stays_within_its_bounds_whatever_the_engine_says(
    readings: list[tuple[EngineLoad | None, int, bool]], setting: int
) -> None:
    """Never below one, never above the maximum; grown only after clean readings, by at most a quarter."""
    bounds = SlotBounds(setting, setting + 100)
    state, clean = first_state(bounds), 0
    for load, busy, all_in_use in readings:
        before = state.limit
        state = next_state(state, bounds, load, busy=busy, all_in_use=all_in_use)
        assert 1 <= state.limit <= bounds.maximum
        wanted = all_in_use or before < setting
        clean = clean + 1 if load is not None and not load.waiting and wanted else 0
        if load is not None and state.limit > before:
            assert clean >= CLEAN_READINGS
            assert state.limit <= before + max(before // 4, 1)
