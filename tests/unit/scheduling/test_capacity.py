"""What a full worker serves: learnt while all are full, doubted with age, and what it is good for."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from queue_schemas import LANES, Lane
from scheduling.autoscale import LaneLoad, PoolLoad, ScalingRules, Stabilizer, replicas_wanted
from scheduling.capacity import DOUBLE_MS, FORGET_MS, FULL_AFTER_MS, WorkerCapacity

RULES = ScalingRules(min=1, max=40, worker_slots=32)
COST = 200


def pool(
    workers: int,
    *,
    waiting: int = 0,
    running: int = 0,
    run_ms: float = 1_000,
    per_s: float = 10,
    age_ms: float = FULL_AFTER_MS,
) -> PoolLoad:
    """Workers of 32 slots and interactive jobs, all of which cost the same."""
    lane = LaneLoad(waiting, running, age_ms, run_ms=run_ms, usual_run_ms=run_ms, ms_per_cost=run_ms / COST)
    return PoolLoad({Lane.INTERACTIVE: lane}, workers=workers, slots=32 * workers, arrivals_per_s=per_s)


def test_full_workers_say_what_one_serves() -> None:
    """Two with 64 jobs of four seconds: eight a second each. Free slots say nothing, nor does a full fleet behind which
    nobody waits, or only for a moment: its workers may be about to take more."""
    capacity = WorkerCapacity()
    for load in (
        pool(2, running=63),
        pool(2, running=63, waiting=5),
        pool(2, running=64),
        pool(2, running=64, waiting=5, age_ms=FULL_AFTER_MS - 1),
    ):
        capacity.wish(load, RULES, 1_000.0)
        assert capacity.per_s(1_000.0) is None
    capacity.wish(pool(2, running=64, waiting=1, run_ms=4_000), RULES, 2_000.0)
    assert capacity.per_s(2_000.0) == pytest.approx(8)


def test_work_of_all_lanes_says_what_a_worker_computes() -> None:
    """Full of lines of a batch that cost five times as much: interactive jobs would run five times as fast."""
    lanes = {
        Lane.INTERACTIVE: LaneLoad(0, 1, usual_run_ms=400, ms_per_cost=400 / COST),
        Lane.BATCH: LaneLoad(9, 31, 60_000, usual_run_ms=2_000, ms_per_cost=400 / COST),
    }
    capacity = WorkerCapacity()
    capacity.wish(PoolLoad(lanes, workers=1, slots=32, arrivals_per_s=1.0), RULES, 1_000.0)
    assert capacity.per_s(1_000.0) == pytest.approx(32 / 0.4)


def test_it_follows_what_is_measured_within_half_a_minute() -> None:
    """Other engines, or other jobs."""
    capacity = WorkerCapacity()
    for second in range(100):
        capacity.wish(pool(1, waiting=1, running=32, run_ms=4_000), RULES, second * 1_000.0)
    for second in range(100, 130):
        capacity.wish(pool(1, waiting=1, running=32, run_ms=2_000), RULES, second * 1_000.0)
    assert capacity.per_s(130_000.0) == pytest.approx(16, rel=0.05)


def test_what_nobody_confirms_is_doubted_and_forgotten() -> None:
    """Else a fleet that is never full again would keep more workers than it needs for ever."""
    capacity = WorkerCapacity()
    capacity.wish(pool(1, waiting=1, running=32, run_ms=4_000), RULES, 0.0)
    for half_days in (1, 2, 5):
        assert capacity.per_s(half_days * DOUBLE_MS) == pytest.approx(8 * 2**half_days)
    for later in (FORGET_MS, 1_000 * FORGET_MS, 1e300):
        assert capacity.per_s(later) is None


_figures = st.none() | st.floats(0, 2**40) | st.sampled_from([0.001, math.nan, -1.0, math.inf])
_loads = st.builds(
    PoolLoad,
    lanes=st.dictionaries(
        st.sampled_from(LANES),
        st.builds(
            LaneLoad,
            waiting=st.integers(0, 2**40),
            leased=st.integers(-1, 2**40),
            oldest_age_ms=st.sampled_from([0.0, 5_000.0]),
            usual_run_ms=_figures,
            ms_per_cost=_figures,
        ),
    ),
    workers=st.integers(0, 100),
    slots=st.integers(0, 1_000),
    arrivals_per_s=_figures,
)


@given(st.lists(st.tuples(_loads, st.floats(0, 1e12)), max_size=20))
def test_absurd_figures_are_not_learnt(looks: list[tuple[PoolLoad, float]]) -> None:
    """What was learnt from mad ones must not make sane ones unbelievable: the fleet would stay as it is for good."""
    capacity, now_ms = WorkerCapacity(), 0.0
    for load, passed_ms in looks:
        now_ms += passed_ms
        capacity.wish(load, RULES, now_ms)
        assert (capacity.per_s(now_ms) or 1.0) > 0
        wish = capacity.wish(pool(3, waiting=5, running=9), RULES, now_ms)
        assert wish.replicas is not None
        assert 1 <= wish.replicas <= 40


def sizes_over_two_hours(
    run_s: Callable[[float], float], capacity: Callable[[], WorkerCapacity]
) -> tuple[list[int], int]:
    """A fleet under twelve jobs a second, workers that take a minute to start: its size each second, and the seconds
    in which more waits than comes in two. ``run_s``: how long a job takes on a worker with so many."""
    stabilizer = Stabilizer()
    size, waiting, running, late = 1, 0.0, 0.0, 0
    sizes: list[int] = []
    starts: list[tuple[int, int]] = []
    for second in range(7_200):
        ready = size - sum(count for at, count in starts if at > second)
        run = run_s(running / max(ready, 1))
        waiting += 12
        running -= running / run
        begun = min(waiting, 32 * max(ready, 0) - running)
        waiting, running = waiting - begun, running + begun
        load = pool(
            ready,
            waiting=int(waiting),
            running=math.ceil(running),
            run_ms=run * 1_000,
            per_s=12,
            age_ms=waiting / 12 * 1_000,
        )
        wish = capacity().wish(load, RULES, second * 1_000.0, start_up_ms=60_000)
        wanted = stabilizer.decide(wish, size, second * 1_000.0, RULES, start_up_ms=60_000).replicas
        if wanted > size:
            starts.append((second + 60, wanted - size))
        size = wanted
        sizes.append(size)
        late += waiting > 24
    return sizes, late


@pytest.mark.parametrize("by", [0.01, 0.02])
def test_a_steady_load_keeps_its_fleet(by: float) -> None:
    """Where jobs run slower the more there are, a fleet that believes the run times of idle slots shrinks until jobs
    wait, and grows again, over and over. With what full workers were seen to serve it does so once."""

    def run_s(running: float) -> float:
        return 3 + by * running**2

    learnt = WorkerCapacity()
    sizes, late = sizes_over_two_hours(run_s, lambda: learnt)
    forgetful_sizes, forgetful_late = sizes_over_two_hours(run_s, WorkerCapacity)
    assert max(sizes[3_600:]) - min(sizes[3_600:]) <= 2
    assert late < 150, "only until the first workers have started"
    assert max(forgetful_sizes[3_600:]) - min(forgetful_sizes[3_600:]) >= 5
    assert forgetful_late > 10 * late


@given(_loads, st.floats(0, 1e9))
def test_whoever_has_watched_nothing_says_what_a_router_says(load: PoolLoad, now_ms: float) -> None:
    """From the same figures: what Routers tell KEDA differs from an autoscaler's wish by what that one has seen."""
    assert WorkerCapacity().wish(load, RULES, now_ms) == replicas_wanted(load, RULES)
