"""How many workers a pool needs: monotone, bounded, awake for one job, steady under flapping load."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from queue_schemas import LANES, Lane, LaneDepth
from queue_schemas.fleet.pools import pool_depth
from scheduling.autoscale import (
    MAX_SLOWDOWN,
    Candidate,
    Decision,
    LaneLoad,
    PoolLoad,
    ScalingRules,
    Stabilizer,
    Wish,
    drain_order,
    load_of,
    replicas_wanted,
    together,
)

RULES = ScalingRules(min=0, max=10, worker_slots=4, scale_in_after_ms=60_000)
WIDE = replace(RULES, max=1_000_000)

_counts = st.integers(0, 100_000)
_unknown = st.none()
_lane = st.builds(
    LaneLoad,
    waiting=_counts,
    leased=_counts,
    oldest_age_ms=st.floats(0, 1e7),
    run_ms=_unknown | st.floats(1, 1e6),
    deadline_ms=_unknown | st.floats(-1e6, 1e8),
    usual_run_ms=_unknown | st.floats(1, 1e6),
)
_load = st.builds(
    PoolLoad,
    lanes=st.dictionaries(st.sampled_from(LANES), _lane),
    workers=st.integers(0, 100),
    slots=st.integers(0, 10_000),
    arrivals_per_s=_unknown | st.floats(0, 1e4),
)
_rules = st.builds(
    lambda low, more, wait, slots: ScalingRules(min=low, max=low + more, target_wait_ms=wait, worker_slots=slots),
    st.integers(0, 20),
    st.integers(0, 50),
    st.floats(0, 1e6),
    st.integers(1, 256),
)


def interactive(waiting: int = 0, leased: int = 0, **more: float) -> dict[Lane, LaneLoad]:
    return {Lane.INTERACTIVE: LaneLoad(waiting, leased, **more)}


def wanted(
    load: PoolLoad, rules: ScalingRules = RULES, *, start_up_ms: float = 0, worker_per_s: float | None = None
) -> int:
    found = replicas_wanted(load, rules, start_up_ms=start_up_ms, worker_per_s=worker_per_s).replicas
    assert found is not None
    return found


@given(_load, _rules, st.floats(0, 1e6))
def test_what_is_wanted_lies_within_the_bounds(load: PoolLoad, rules: ScalingRules, start_up_ms: float) -> None:
    """Whatever the figures are."""
    assert rules.min <= wanted(load, rules, start_up_ms=start_up_ms) <= rules.max


@given(
    _load, st.sampled_from(LANES), st.integers(0, 1_000), st.integers(0, 1_000), st.floats(0, 1e6), st.floats(0, 1e6)
)
def test_more_work_never_wants_fewer_workers(
    load: PoolLoad, lane: Lane, waiting: int, leased: int, age_ms: float, start_up_ms: float
) -> None:
    """More that waits or runs, or has waited longer, in any lane."""
    before = load.lanes.get(lane, LaneLoad())
    after = replace(
        before,
        waiting=before.waiting + waiting,
        leased=before.leased + leased,
        oldest_age_ms=before.oldest_age_ms + age_ms,
    )
    more = replace(load, lanes={**load.lanes, lane: after})
    assert wanted(load, WIDE, start_up_ms=start_up_ms) <= wanted(more, WIDE, start_up_ms=start_up_ms)


@given(_load, st.floats(0, 1e5), st.floats(0, 1e5))
def test_a_longer_wait_wants_no_more_workers(load: PoolLoad, wait_ms: float, more_ms: float) -> None:
    """Patience is cheaper, apart from the one worker that is wanted where figures and waits disagree."""
    patient = replace(WIDE, target_wait_ms=wait_ms + more_ms, background_wait_ms=2 * (wait_ms + more_ms))
    hasty = replace(WIDE, target_wait_ms=wait_ms, background_wait_ms=2 * wait_ms)
    assert wanted(load, patient) <= wanted(load, hasty)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("run_ms", [None, 1.0, 60_000.0])
@pytest.mark.parametrize("arrivals", [None, 0.0])
def test_one_job_of_any_lane_wakes_a_pool(lane: Lane, run_ms: float | None, arrivals: float | None) -> None:
    """One worker, not more, whatever is known of it."""
    load = PoolLoad({lane: LaneLoad(waiting=1, run_ms=run_ms)}, arrivals_per_s=arrivals)
    assert wanted(load) == 1
    assert wanted(PoolLoad({lane: LaneLoad()})) == 0


def test_without_a_known_run_time_each_interactive_job_wants_a_slot() -> None:
    """So does a lane of background jobs whose oldest has waited too long; before that one slot does."""
    assert wanted(PoolLoad(interactive(9, 4))) == math.ceil(13 / 4)
    batch = LaneLoad(waiting=500, oldest_age_ms=1_000)
    assert wanted(PoolLoad({Lane.BATCH: batch})) == 1
    late = replace(batch, oldest_age_ms=RULES.background_wait_ms + 1)
    assert wanted(PoolLoad({Lane.BATCH: late})) == RULES.max


def test_known_run_times_let_slots_be_used_again() -> None:
    """With a target of 2 s, a slot begins two jobs of one second while one runs: a third of the slots does."""
    assert wanted(PoolLoad(interactive(30, run_ms=1_000))) == math.ceil(30 / 3 / 4)
    assert wanted(PoolLoad(interactive(30, run_ms=1_000_000)), WIDE) == math.ceil(30 / 4)
    batch = LaneLoad(waiting=610, run_ms=10_000)
    assert wanted(PoolLoad({Lane.BATCH: batch})) == math.ceil(610 / 61 / 4)


def test_run_times_follow_from_the_cost_of_what_waits() -> None:
    """And from how long jobs of that cost took of late: thirty jobs of 200 units, 5 ms each, run for a second each."""
    depth = LaneDepth(
        waiting=30, leased=2, oldest_age_ms=70, cost=6_000, ms_per_cost=5.0, deadline_ms=99_000, ms_per_job=700.0,
        arrivals_per_s=3.5,
    )  # fmt: skip
    load = load_of(pool_depth("m", {Lane.INTERACTIVE: depth}, workers=2, slots=8))
    assert load.lanes[Lane.INTERACTIVE] == LaneLoad(
        30, 2, 70, run_ms=1_000.0, deadline_ms=99_000, usual_run_ms=700.0, ms_per_cost=5.0
    )
    assert load.arrivals_per_s == 3.5
    assert (load.workers, load.slots) == (2, 8)
    assert wanted(load) == math.ceil(32 / 3 / 4)
    for unknown in ({"cost": 0}, {"ms_per_cost": None}, {"ms_per_cost": 0.0}, {"waiting": 0}):
        blind = load_of(pool_depth("m", {Lane.BATCH: depth.model_copy(update=unknown)}, workers=2, slots=8))
        assert blind.lanes[Lane.BATCH].run_ms is None


def test_a_deadline_that_no_worker_can_meet_starts_none() -> None:
    """Else whoever sends one background job with a deadline of a second has the whole fleet started, for nothing."""
    rules, backlog = ScalingRules(max=1_000, worker_slots=1), LaneLoad(610, run_ms=10_000)
    usual = replicas_wanted(PoolLoad({Lane.BATCH: backlog}), rules, start_up_ms=60_000).replicas
    for deadline_ms in (0, 1_000, 60_000, 69_999):
        load = PoolLoad({Lane.BATCH: replace(backlog, deadline_ms=deadline_ms)})
        assert replicas_wanted(load, rules, start_up_ms=60_000).replicas == usual
    load = PoolLoad({Lane.BATCH: replace(backlog, deadline_ms=70_000)})
    assert (replicas_wanted(load, rules, start_up_ms=60_000).replicas or 0) > 5 * (usual or 0)


def test_a_near_deadline_makes_a_batch_urgent() -> None:
    """What is left until it, less the job's own time, is the wait that is allowed."""
    far, near = LaneLoad(610, run_ms=10_000, deadline_ms=86_400_000), LaneLoad(610, run_ms=10_000, deadline_ms=30_000)
    assert wanted(PoolLoad({Lane.BATCH: far}), WIDE) == math.ceil(610 / 61 / 4)
    assert wanted(PoolLoad({Lane.BATCH: near}), WIDE) == math.ceil(610 / 3 / 4)


@given(_load, st.floats(0, 1e4), st.floats(0, 1e6), _unknown | st.floats(0.001, 1e4))
def test_more_arrivals_never_want_fewer_workers(
    load: PoolLoad, more_per_s: float, start_up_ms: float, worker_per_s: float | None
) -> None:
    """Once they are known."""
    known = replace(load, arrivals_per_s=load.arrivals_per_s or 0.0)
    more = replace(known, arrivals_per_s=(known.arrivals_per_s or 0.0) + more_per_s)
    before, after = (wanted(one, WIDE, start_up_ms=start_up_ms, worker_per_s=worker_per_s) for one in (known, more))
    assert before <= after


def test_arrivals_keep_slots_busy() -> None:
    """Ten jobs of a second each second want ten slots by Little's law, however few run at the moment; what is busy
    counts as well, without a margin: it says what is, not what must be."""
    for lane in (interactive(0, 2, usual_run_ms=1_000), interactive(0, 2, run_ms=1_000)):
        assert wanted(PoolLoad(lane, workers=2, slots=8, arrivals_per_s=10.0), WIDE) == math.ceil(10 / 4)
        assert wanted(PoolLoad(lane, workers=2, slots=8, arrivals_per_s=0.1), WIDE) == 1
    busy = interactive(0, 8, usual_run_ms=1_000)
    assert wanted(PoolLoad(busy, workers=2, slots=8, arrivals_per_s=1.0), WIDE) == 2
    assert wanted(PoolLoad(busy, workers=2, slots=8), WIDE) == math.ceil((1 + 7 / 0.85) / 4) == 3


def test_how_long_jobs_took_of_late_is_known_also_where_none_waits() -> None:
    """Those that wait say more of themselves: they may cost less than usual."""
    load = PoolLoad(interactive(0, 1, usual_run_ms=3_000), workers=2, slots=8, arrivals_per_s=4.0)
    assert wanted(load, WIDE) == math.ceil(4 * 3 / 4)
    short = PoolLoad(interactive(30, run_ms=1_000, usual_run_ms=1_000_000))
    assert wanted(short, WIDE) == math.ceil(30 / 3 / 4)


def test_no_worker_is_started_for_what_those_there_finish_sooner() -> None:
    """A burst that is over before a new worker would take work, if no more comes than they can serve."""
    burst = PoolLoad(interactive(40, 8, run_ms=1_000), workers=2, slots=8, arrivals_per_s=1.0)
    assert wanted(burst, WIDE) == math.ceil(48 / 3 / 4)
    assert wanted(burst, WIDE, start_up_ms=5_000) == math.ceil((48 - 7 * 5) / 3 / 4)
    assert wanted(burst, WIDE, start_up_ms=60_000) == 2
    assert wanted(replace(burst, arrivals_per_s=8.0), WIDE, start_up_ms=60_000) == math.ceil(48 / 3 / 4)
    assert wanted(replace(burst, arrivals_per_s=None), WIDE, start_up_ms=60_000) == math.ceil(48 / 3 / 4)


def test_what_full_workers_were_seen_to_serve_counts_while_slots_are_idle() -> None:
    """Ten jobs a second of 0.4 s keep one worker of four slots busy, by the run times of workers that have hardly
    anything to do; but a full one serves five a second, and at most 85 % of that."""
    load = PoolLoad(interactive(0, 4, usual_run_ms=400), workers=4, slots=16, arrivals_per_s=10.0)
    assert wanted(load) == 1
    assert wanted(load, worker_per_s=5.0) == math.ceil(10 / 5 / 0.85)
    assert "a worker serves 5/s" in replicas_wanted(load, RULES, worker_per_s=5.0).why
    assert wanted(load, worker_per_s=50.0) == 1
    assert wanted(replace(load, arrivals_per_s=None), worker_per_s=5.0) == 2, "as without it"
    assert wanted(load, worker_per_s=0.01) == MAX_SLOWDOWN, "an engine hung while that was learnt"


@pytest.mark.parametrize("figures", [{"start_up_ms": math.nan}, {"start_up_ms": -1}, {"worker_per_s": math.nan}])
def test_absurd_knowledge_says_nothing(figures: dict[str, float]) -> None:
    """Of starts and of what workers serve."""
    assert "cannot be" in replicas_wanted(PoolLoad(interactive(1)), RULES, **figures).why


def test_late_jobs_without_a_free_slot_want_one_worker_more() -> None:
    """The figures say that two do, the wait says that they do not."""
    late = PoolLoad(interactive(2, 8, run_ms=100, oldest_age_ms=3_000), workers=2, slots=8)
    assert wanted(late) == 3
    assert "late" in replicas_wanted(late, RULES).why
    stuck = PoolLoad(interactive(1, 0, run_ms=100, oldest_age_ms=3_000), workers=2, slots=8)
    assert wanted(stuck) == 1, "a slot is free: more workers would not help"


@pytest.mark.parametrize(
    "load",
    [
        PoolLoad(interactive(-1)),
        PoolLoad(interactive(2**62)),
        PoolLoad(interactive(1, oldest_age_ms=-5.0)),
        PoolLoad(interactive(1, run_ms=math.nan)),
        PoolLoad(interactive(1, run_ms=math.inf)),
        PoolLoad(interactive(1), slots=-4),
        PoolLoad(interactive(1), workers=-4),
        PoolLoad(interactive(1), arrivals_per_s=math.nan),
        PoolLoad(interactive(1, deadline_ms=math.inf)),
        PoolLoad(interactive(1, usual_run_ms=math.nan)),
        PoolLoad(interactive(1, usual_run_ms=-1.0)),
        PoolLoad(interactive(1, ms_per_cost=math.inf)),
        PoolLoad(interactive(1), arrivals_per_s=-0.5),
    ],
)
def test_absurd_figures_say_nothing(load: PoolLoad) -> None:
    """And the size stays as it is, which the decision says."""
    wish = replicas_wanted(load, RULES)
    assert wish.replicas is None
    decision = Stabilizer().decide(wish, 4, 0.0, RULES)
    assert decision == Decision(4, f"nothing changes: {wish.why}")
    assert "cannot be" in decision.why


def run(stabilizer: Stabilizer, wishes: list[int | None], size: int = 0, every_ms: float = 1_000) -> list[int]:
    """The sizes after each wish, had every ``every_ms``, where each decision is carried out at once."""
    sizes = []
    for tick, replicas in enumerate(wishes):
        size = stabilizer.decide(Wish(replicas, ""), size, tick * every_ms, RULES).replicas
        sizes.append(size)
    return sizes


def test_it_grows_at_once_and_shrinks_after_a_quiet_window() -> None:
    """To what was wanted most within it."""
    sizes = run(Stabilizer(), [0, 5] + [2] * 61)
    assert sizes == [0, 5] + [5] * 59 + [2] * 2


@given(st.integers(1, 59), st.integers(1, 59), st.integers(0, 10), st.integers(0, 10))
def test_flapping_load_does_not_flap_the_fleet(high_s: int, low_s: int, high: int, low: int) -> None:
    """Load that comes and goes faster than the window changes the size once."""
    sizes = run(Stabilizer(), ([high] * high_s + [low] * low_s) * 6)
    assert sorted(sizes) == sizes, "it never shrinks"
    assert len(set(sizes[high_s + 1 :])) == 1


@given(st.lists(_unknown | st.integers(-5, 40), min_size=1, max_size=300), st.integers(0, 10))
def test_it_never_leaves_the_bounds_and_shrinks_at_most_once_a_window(wishes: list[int | None], size: int) -> None:
    """Whatever is wanted; and it never shrinks below what was wanted within the window."""
    sizes = run(Stabilizer(), wishes, size)
    assert all(RULES.min <= one <= RULES.max for one in sizes)
    for tick in range(1, len(sizes)):
        window = wishes[max(0, tick - 59) : tick + 1]
        known = [RULES.bounded(one) for one in window if one is not None]
        if sizes[tick] < sizes[tick - 1]:
            assert None not in window
            assert tick >= 59
            assert sizes[tick] >= max(known)


def test_it_does_not_shrink_before_it_has_watched_for_a_window() -> None:
    """A new autoscaler knows nothing of the load before it; nor does one whose figures were missing."""
    assert run(Stabilizer(), [0] * 60, size=3)[-1] == 3
    assert run(Stabilizer(), [0] * 61, size=3)[-1] == 0
    assert run(Stabilizer(), [0] * 30 + [None] + [0] * 59, size=3)[-1] == 3


def test_a_worker_that_takes_long_to_start_is_kept_as_long() -> None:
    """The window is at least the time to start one."""
    stabilizer = Stabilizer()
    for second in range(300):
        size = stabilizer.decide(Wish(0, ""), 3, second * 1_000, RULES, start_up_ms=300_000).replicas
        assert size == 3
    assert stabilizer.decide(Wish(0, ""), 3, 300_000, RULES, start_up_ms=300_000).replicas == 0


def test_a_lower_maximum_is_kept_at_once() -> None:
    """An operator's bound is no wish; but nothing shrinks while nothing is known."""
    assert Stabilizer().decide(Wish(10, ""), 14, 0.0, RULES).replicas == 10
    assert Stabilizer().decide(Wish(None, ""), 14, 0.0, RULES).replicas == 14
    assert Stabilizer().decide(Wish(None, ""), 0, 0.0, replace(RULES, min=2)).replicas == 2


def test_those_go_first_whose_end_costs_least() -> None:
    """Not ready, then idle, then the youngest."""
    workers = [Candidate("w-9", 0), Candidate("w-10", 0), Candidate("w-2", 3), Candidate("w-3", 0, ready=False)]
    assert drain_order(workers) == ["w-3", "w-10", "w-9", "w-2"]


def test_pools_that_the_same_workers_serve_are_one() -> None:
    """Workers are counted once, jobs all, times by how many jobs each is of."""
    base = PoolLoad({Lane.INTERACTIVE: LaneLoad(1, 3, 100.0, 1_000.0, None, 800.0, 2.0)}, 2, 8, 1.5)
    adapter = PoolLoad(
        {
            Lane.INTERACTIVE: LaneLoad(3, 1, 900.0, 2_000.0, 5_000.0, 1_600.0, 4.0),
            Lane.BATCH: LaneLoad(waiting=7),
        },
        1,
        4,
        0.5,
    )
    found = together([base, adapter, PoolLoad({})])
    assert found.lanes == {
        Lane.INTERACTIVE: LaneLoad(4, 4, 900.0, 1_750.0, 5_000.0, 1_200.0, 3.0),
        Lane.BATCH: LaneLoad(waiting=7),
    }
    assert (found.workers, found.slots, found.arrivals_per_s) == (2, 8, 2.0)
    assert together([base]) is base
    assert together([PoolLoad({}), PoolLoad({})]) == PoolLoad({})
