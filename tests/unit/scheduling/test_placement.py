"""Which model each worker loads: one round, and many rounds of a small fleet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from queue_schemas import Lane, LaneDepth
from scheduling.placement import (
    BACKGROUND_WAIT_S,
    MAX_MOVES,
    SLICES,
    PlacedWorker,
    PoolDemand,
    PoolRules,
    demand_of,
    dwell_s,
    place,
)

MODELS = ("a", "b", "c")
RULES = PoolRules(start_s=10.0)


def worker(number: int = 1, loaded: str = "a", **fields: object) -> PlacedWorker:
    given = {"models": frozenset({loaded}), "slots": 4, "loadable": frozenset(MODELS)} | fields
    return PlacedWorker(worker_id=f"w{number}", loaded=loaded, **given)  # type: ignore[arg-type]


def pool(model: str, interactive: int = 0, waiting: int = 0, age_s: float = 0.0, **fields: object) -> PoolDemand:
    given = {"rules": RULES, "late_s": age_s} | fields
    return PoolDemand(model=model, interactive=interactive, waiting=waiting, age_s=age_s, **given)  # type: ignore[arg-type]


def moved(pools: Iterable[PoolDemand], workers: Iterable[PlacedWorker]) -> list[tuple[str, str]]:
    return [(move.worker_id, move.model) for move in place(pools, workers)]


# One round


def test_an_idle_worker_goes_to_jobs_that_nobody_serves() -> None:
    """In the same round, before a worker with work is asked."""
    busy, idle = worker(1, running=2), worker(2, "c")
    assert moved([pool("a", 2), pool("b", 1, 1)], [busy, idle]) == [("w2", "b")]


def test_a_pool_with_room_gives_its_least_busy_worker() -> None:
    """It keeps slots for all that it has."""
    workers = [worker(1, running=3), worker(2, running=0)]
    assert moved([pool("a", 3), pool("b", 1, 1)], workers) == [("w2", "b")]
    assert moved([pool("a", 4), pool("b", 1, 1)], workers) == []  # the rest would be too full


def test_batches_in_time_give_way_to_interactive_jobs_at_once() -> None:
    """Not to other batches, and not once they have waited for too long."""
    batches = pool("a", others=9, waiting=5, age_s=99.0, late_s=99.0 - BACKGROUND_WAIT_S)
    late = pool("a", others=9, waiting=5, age_s=650.0, late_s=650.0 - BACKGROUND_WAIT_S)
    workers = [worker(1, running=4)]
    assert moved([batches, pool("b", 1, 1)], workers) == [("w1", "b")]
    assert moved([batches, replace(batches, model="b")], workers) == []
    assert moved([late, pool("b", 1, 1)], workers) == []
    assert moved([batches, replace(batches, model="b")], [*workers, worker(2, running=4)]) == []


def test_workers_that_cannot_load_it_stay() -> None:
    """Those with one model, without this one, or where it failed not long ago."""
    fixed = worker(1, loadable=frozenset())
    other = worker(2, loadable=frozenset("ac"))
    failed = worker(3, refused=frozenset("b"))
    assert moved([pool("b", 1, 1)], [fixed, other, failed]) == []


def test_a_busy_pools_last_worker_is_taken_only_for_older_work() -> None:
    """And not before that has waited as long as its model takes to load; batches wait longer."""
    last = [worker(1, running=4)]
    assert moved([pool("a", 9, 5, 3.0), pool("b", 1, 1, 9.9)], last) == []
    assert moved([pool("a", 9, 5, 12.0), pool("b", 1, 1, 11.0)], last) == []
    assert moved([pool("a", 9, 5, 3.0), pool("b", 1, 1, 10.0)], last) == [("w1", "b")]
    bound_s = SLICES * dwell_s(last[0], RULES)
    assert moved([pool("a", 9, 5, 999.0), pool("b", 1, 1, bound_s, unserved_s=bound_s)], last) == [("w1", "b")]
    batch = pool("b", others=1, waiting=1, age_s=500.0, late_s=500.0 - BACKGROUND_WAIT_S)
    assert moved([pool("a", 4), batch], last) == []


def test_a_worker_stays_for_its_dwell_time() -> None:
    """Twice what its load took, or was declared to take; while it loads it is left alone."""
    wanted = [pool("a"), pool("b", 1, 1, 500.0)]
    assert moved(wanted, [worker(since_s=19.0)]) == []
    assert moved(wanted, [worker(since_s=20.0)]) == [("w1", "b")]
    assert moved(wanted, [worker(since_s=59.0, load_s=30.0)]) == []
    assert moved(wanted, [worker(since_s=900.0, load_s=None)]) == []
    assert moved(wanted, [worker(since_s=None, load_s=None)]) == [("w1", "b")]  # starts with its own model, idle


def test_a_worker_whose_load_failed_is_free_at_once() -> None:
    """It is no capacity of the pool that it failed for."""
    failed = worker(1, "b", since_s=1.0, load_s=None, failed=True, refused=frozenset("b"))
    assert moved([pool("a", 1, 1), pool("b", 1, 1)], [failed]) == [("w1", "a")]
    assert moved([pool("b", 1, 1)], [failed, worker(2, "c")]) == [("w2", "b")]


def test_bounds_are_kept() -> None:
    """No pool falls below its minimum for another's work; one below it is filled; none rises above its maximum."""
    reserved = replace(RULES, min_workers=1)
    assert moved([pool("a", rules=reserved), pool("b", 9, 9, 900.0)], [worker(1)]) == []
    assert moved([pool("a"), pool("b", rules=reserved)], [worker(1)]) == [("w1", "b")]
    assert moved([pool("a", 4, rules=RULES), pool("b", rules=reserved)], [worker(1)]) == []
    assert moved([pool("b", 1, 1, rules=replace(RULES, max_workers=0))], [worker(1)]) == []


class CountedSet(frozenset[str]):
    """Counts how often it is asked for a model."""

    asked = 0

    def __contains__(self, model: object) -> bool:
        CountedSet.asked += 1
        return super().__contains__(model)


@given(waiting=st.integers(1, 9), age_s=st.sampled_from([0.0, 9.0, 10.0, 900.0]), unserved=st.integers(0, 30))
def test_pools_that_cannot_have_any_worker_look_at_none(waiting: int, age_s: float, unserved: int) -> None:
    """A round of a large fleet in which every worker is needed takes as long as it has workers and pools, not as their
    product."""
    models = [f"m{number}" for number in range(60)]
    CountedSet.asked = 0
    workers = [
        worker(number, model, models=CountedSet({model}), loadable=CountedSet(models))
        for number, model in enumerate(models[unserved:])
    ]
    busy = [pool(model, 4 + waiting, waiting, age_s) for model in models[unserved:]]
    alone = [pool(model, 1, 1, min(age_s, 9.0)) for model in models[:unserved]]
    assert moved([*busy, *alone], workers) == []
    assert CountedSet.asked == 0


def test_a_pool_with_more_jobs_than_slots_gets_one_worker_a_round() -> None:
    """Once its oldest job has waited for as long as a load takes, from a pool that has room without it, or too many
    jobs as well, but fewer to a slot."""
    workers = [worker(1), worker(2), worker(3, "b")]
    full = pool("b", 40, 36, 10.0)
    assert moved([full], workers) == [("w1", "b")]
    assert moved([pool("b", 40, 36, 9.0)], workers) == []
    assert moved([pool("a", 8), full], workers) == []
    assert moved([pool("a", 3), full], workers) == [("w1", "b")]
    assert moved([pool("a", 12, 4), full], workers) == [("w1", "b")]
    assert moved([pool("a", 24, 16), full], workers) == []
    assert moved([pool("a", 4), pool("b", others=40, waiting=36, age_s=99.0, late_s=99.0)], workers) == []
    assert moved([pool("a", 3), pool("b", others=40, waiting=36, age_s=99.0, late_s=99.0)], workers) == [("w1", "b")]


def test_a_round_moves_few() -> None:
    """However many workers idle and pools wait; the oldest work goes first."""
    models = [f"m{number}" for number in range(9)]
    idle = [worker(number, loadable=frozenset(models)) for number in range(30)]
    moves = place([pool(model, 1, 1, float(number)) for number, model in enumerate(models)], idle)
    assert [move.model for move in moves] == ["m8", "m7", "m6", "m5"]
    assert len({move.worker_id for move in moves}) == MAX_MOVES


def test_demand_is_read_from_lanes() -> None:
    """Batches are late only beyond what they may wait; running jobs have no age."""
    lanes = {
        Lane.INTERACTIVE: LaneDepth(leased=2),
        Lane.BATCH: LaneDepth(waiting=5, leased=1, oldest_age_ms=700_000),
    }
    demand = demand_of("m", lanes, RULES)
    assert (demand.interactive, demand.others, demand.waiting) == (2, 6, 5)
    assert (demand.age_s, demand.late_s) == (700.0, 100.0)
    assert demand_of("m", {}, RULES) == PoolDemand(model="m", rules=RULES)


# Many rounds


@dataclass
class Fleet:
    """Workers that load for ``load_s`` and then run jobs of ``job_s``; ``arrive`` says how many come in a second."""

    workers: dict[str, PlacedWorker]
    rules: dict[str, PoolRules]
    arrive: Callable[[str, int], int]
    load_s: float = 10.0
    job_s: int = 2
    broken: frozenset[tuple[str, str]] = frozenset()
    now: int = 0
    waiting: dict[str, deque[int]] = field(default_factory=lambda: {model: deque() for model in MODELS})
    """When each came."""
    running: dict[str, list[tuple[int, str, int]]] = field(default_factory=dict)
    """By worker: when each ends, its model, when it came."""
    moves: list[tuple[int, str, str]] = field(default_factory=list)
    unserved: dict[str, int] = field(default_factory=dict)
    """For how long jobs of each model have waited without a worker that serves or loads it."""
    longest_unserved: int = 0

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self._second()

    def _second(self) -> None:
        self.now += 1
        for model in MODELS:
            self.waiting[model].extend([self.now] * self.arrive(model, self.now))
        for name, one in self.workers.items():
            jobs = [job for job in self.running.get(name, []) if job[0] > self.now]
            while one.load_s is not None and not one.failed and len(jobs) < one.slots and self.waiting[one.loaded]:
                jobs.append((self.now + self.job_s, one.loaded, self.waiting[one.loaded].popleft()))
            self.running[name] = jobs
        for name, one in self.workers.items():
            since = None if one.since_s is None else one.since_s + 1
            load_s, failed = one.load_s, one.failed
            if load_s is None and since is not None and since >= self.load_s:
                failed = (name, one.loaded) in self.broken
                load_s = None if failed else self.load_s
            refused = one.refused | {one.loaded} if failed else one.refused
            running = len(self.running[name])
            self.workers[name] = replace(
                one, since_s=since, load_s=load_s, failed=failed, refused=refused, running=running
            )
        demand = [self._demand(model) for model in MODELS]
        for one in demand:
            loads = any(worker.loaded == one.model and not worker.failed for worker in self.workers.values())
            self.unserved[one.model] = 0 if loads or not one.waiting else self.unserved.get(one.model, 0) + 1
        self.longest_unserved = max(self.longest_unserved, *self.unserved.values())
        for move in place(demand, self.workers.values()):
            assert sum(made[0] == self.now for made in self.moves) < MAX_MOVES
            self.moves.append((self.now, move.worker_id, move.model))
            one = self.workers[move.worker_id]
            self.workers[move.worker_id] = replace(
                one, loaded=move.model, models=frozenset({move.model}), since_s=0.0, load_s=None, failed=False
            )
            for _, model, came in self.running[move.worker_id]:  # handed back
                self.waiting[model].appendleft(came)
            self.running[move.worker_id] = []

    def _demand(self, model: str) -> PoolDemand:
        waiting = self.waiting[model]
        leased = sum(job[1] == model for jobs in self.running.values() for job in jobs)
        age = float(self.now - waiting[0]) if waiting else 0.0
        rules = self.rules.get(model, RULES)
        return pool(
            model, len(waiting) + leased, len(waiting), age, rules=rules, unserved_s=self.unserved.get(model, 0)
        )

    def apart(self) -> list[int]:
        """Seconds between the moves of each worker."""
        times: dict[str, list[int]] = {}
        for at, name, _ in self.moves:
            times.setdefault(name, []).append(at)
        return [after - before for of in times.values() for before, after in pairwise(of)]


def fleet_of(count: int, arrive: Callable[[str, int], int], **fields: object) -> Fleet:
    workers = {f"w{number}": worker(number, since_s=None) for number in range(1, count + 1)}
    return Fleet(workers, {}, arrive, **fields)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.sampled_from(MODELS), st.integers(0, 3)), min_size=1, max_size=12),
    st.integers(1, 40),
)
def test_any_load_keeps_workers_for_their_dwell_and_starves_nobody(
    count: int, phases: list[tuple[str, int]], phase_s: int
) -> None:
    """Load that jumps between models in any rhythm: no worker moves twice within its dwell time, and a pool with
    waiting jobs has a worker that loads or serves within ``SLICES`` dwell times, and one for each other pool."""

    def arrive(model: str, now: int) -> int:
        wanted, rate = phases[now // phase_s % len(phases)]
        return rate if model == wanted else 0

    fleet = fleet_of(count, arrive)
    fleet.run(400)
    assert min(fleet.apart(), default=99) >= 20
    assert fleet.longest_unserved <= (SLICES + len(MODELS) - 1) * 20 + len(MODELS)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 6), st.tuples(*[st.integers(0, 4)] * 3))
def test_steady_load_comes_to_rest(count: int, rates: tuple[int, int, int]) -> None:
    """While there are workers for all: once each pool has what it needs, nothing moves any more."""
    busy = [rate for rate in rates if rate]
    fleet = fleet_of(count, lambda model, _: rates[MODELS.index(model)])
    fleet.run(300)
    if sum(-(-rate * fleet.job_s // 4) for rate in busy) <= count:
        settled = len(fleet.moves)
        fleet.run(150)
        assert len(fleet.moves) == settled
    assert all(not fleet.waiting[model] or rate for model, rate in zip(MODELS, rates, strict=True))


def test_flapping_load_moves_a_worker_at_most_once_in_a_dwell_time() -> None:
    """A job of another model every three seconds, one worker: it moves every 20 seconds at most, and all are served."""
    fleet = fleet_of(1, lambda model, now: int(now % 3 == 0 and MODELS.index(model) == now // 3 % 2))
    fleet.run(1_000)
    assert min(fleet.apart()) >= 20
    assert len(fleet.moves) <= 1_000 / 20
    assert fleet.longest_unserved <= 60


def test_a_model_that_cannot_be_loaded_costs_each_worker_one_move() -> None:
    """Its jobs wait; those of others are served."""
    broken = frozenset({("w1", "b"), ("w2", "b")})
    fleet = fleet_of(2, lambda model, now: int(model in "ab" and now % 10 == 0), broken=broken)
    fleet.run(600)
    assert [model for _, _, model in fleet.moves].count("b") == 2
    assert not [at for at in fleet.waiting["a"] if at < fleet.now - 60]
