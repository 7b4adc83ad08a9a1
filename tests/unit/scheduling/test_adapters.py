"""Which adapters each worker holds: one round, many rounds of a small fleet, and one round of a large one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.adapters import (
    LATE_S,
    MAX_CHANGES,
    MAX_LOADING,
    SPREAD_WAIT_S,
    STAY_S,
    TURN_S,
    AdapterWorker,
    HeldAdapter,
    assign_adapters,
)
from scheduling.placement import PoolDemand

NAMES = ("a", "b", "c", "d")
LOADABLE = frozenset(NAMES)
OLD = HeldAdapter(1_000.0, 0.5)
FRESH = HeldAdapter(1.0, 0.5)
LOADING = HeldAdapter(0.5, None)


def worker(number: int = 1, held: Mapping[str, HeldAdapter] | None = None, **fields: object) -> AdapterWorker:
    given = {"loadable": LOADABLE, "room": 2, "slots": 4, "held": held or {}} | fields
    return AdapterWorker(worker_id=f"w{number}", **given)  # type: ignore[arg-type]


def pool(name: str, waiting: int = 1, leased: int = 0, **fields: object) -> PoolDemand:
    return PoolDemand(model=name, interactive=waiting + leased, waiting=waiting, **fields)  # type: ignore[arg-type]


def batch(name: str, waiting: int = 1, leased: int = 0, late_s: float = -1.0) -> PoolDemand:
    return PoolDemand(model=name, others=waiting + leased, waiting=waiting, late_s=late_s)


def changes(
    pools: list[PoolDemand],
    workers: list[AdapterWorker],
    idle_s: Mapping[str, float] | None = None,
    unknown: frozenset[str] = frozenset(),
) -> list[tuple[str, str, str]]:
    made = assign_adapters(pools, workers, idle_s or {}, unknown)
    return [(change.worker_id, change.adapter, change.instead_of) for change in made]


# One round


def test_free_room_comes_first() -> None:
    """Also before an adapter that nobody needs; and of two workers with room, the one that loads and runs less."""
    full = worker(1, {"c": OLD, "d": OLD})
    assert changes([pool("a")], [full, worker(2, {"c": OLD})]) == [("w2", "a", "")]
    assert changes([pool("a")], [worker(1, running=3), worker(2, running=1)]) == [("w2", "a", "")]
    assert changes([pool("a")], [worker(1, {"b": LOADING}), worker(2, running=3)]) == [("w2", "a", "")]


def test_what_is_needed_least_makes_room() -> None:
    """Of those without jobs the one that had none for longest; nobody remembers one: it goes first."""
    full = worker(1, {"c": OLD, "d": OLD})
    assert changes([pool("a")], [full], {"c": 5.0, "d": 60.0}) == [("w1", "a", "d")]
    assert changes([pool("a")], [full], {"d": 60.0}) == [("w1", "a", "c")]
    other = worker(2, {"b": OLD, "c": OLD})
    assert changes([pool("a")], [full, other], {"b": 90.0, "c": 5.0, "d": 60.0}) == [("w2", "a", "b")]


def test_an_adapter_stays_for_a_while() -> None:
    """At least ``STAY_S``, or twice what its load took; one that loads is left alone."""
    for held in (FRESH, LOADING, HeldAdapter(STAY_S + 0.4, 0.5), HeldAdapter(24.0, 10.0)):
        assert changes([pool("a")], [worker(1, {"b": held}, room=1)]) == []
    for held in (HeldAdapter(STAY_S + 0.5, 0.5), HeldAdapter(30.0, 10.0), HeldAdapter(131.0, 100.0)):
        assert changes([pool("a")], [worker(1, {"b": held}, room=1)]) == [("w1", "a", "b")]


def test_an_adapter_that_others_can_serve_gives_a_place() -> None:
    """If nothing of it waits and its other workers have room for it; one place in a round."""
    both = [worker(1, {"b": OLD}, room=1), worker(2, {"b": OLD}, room=1)]
    fresh = HeldAdapter(STAY_S + 1, 0.5)
    not_yet = [worker(1, {"b": fresh}, room=1), worker(2, {"b": fresh}, room=1)]
    assert changes([pool("a"), pool("b", 0, 2)], not_yet) == [("w1", "a", "b")]
    assert changes([pool("a"), pool("b", 0, 3)], not_yet) == []
    assert changes([pool("a"), pool("b", 1, 2)], not_yet) == []
    assert [change[2] for change in changes([pool("a"), pool("c"), pool("b", 0, 2)], both)] == ["b"]


def test_adapters_with_jobs_take_turns() -> None:
    """The one that held its place for longest goes, once it had its turn, rather one whose jobs do not wait."""
    young = HeldAdapter(TURN_S + 0.4, 0.5)
    longer, longest = HeldAdapter(TURN_S + 1, 0.5), HeldAdapter(TURN_S + 2, 0.5)
    assert changes([pool("a"), pool("b", 1, 4)], [worker(1, {"b": young}, room=1)]) == []
    full = worker(1, {"b": longer, "c": longest})
    assert changes([pool("a"), pool("b", 1, 2), pool("c", 1, 2)], [full]) == [("w1", "a", "c")]
    assert changes([pool("a"), pool("b", 0, 2), pool("c", 1, 2)], [full]) == [("w1", "a", "b")]


def test_batches_in_time_end_no_turn_of_interactive_jobs() -> None:
    """They do of other batches; late ones of any; and interactive jobs end that of a batch first."""
    full = worker(1, {"b": OLD}, room=1)
    assert changes([batch("a"), pool("b", 1, 4)], [full]) == []
    assert changes([batch("a"), batch("b", 1, 4)], [full]) == [("w1", "a", "b")]
    assert changes([batch("a", late_s=0.0), pool("b", 1, 4)], [full]) == [("w1", "a", "b")]
    both = worker(1, {"b": OLD, "c": HeldAdapter(100.0, 0.5)})
    assert changes([pool("a"), pool("b", 1, 4), batch("c", 1, 4)], [both]) == [("w1", "a", "c")]
    assert changes([batch("a"), pool("d")], [worker(room=1)]) == [("w1", "d", "")]


def test_who_was_without_for_longest_goes_first() -> None:
    """One place for two."""
    pools = [pool("a", 9, unserved_s=1.0), pool("b", 1, unserved_s=2.0)]
    assert changes(pools, [worker(room=1)]) == [("w1", "b", "")]


def test_a_queue_that_its_workers_do_not_get_to_spreads() -> None:
    """After ``SPREAD_WAIT_S``, to a worker with a free slot and room, one at a time; and ends no turn for it."""
    full = worker(1, {"a": OLD}, running=4)
    waiting = pool("a", 3, 4, age_s=SPREAD_WAIT_S)
    assert changes([waiting], [full, worker(2), worker(3)]) == [("w2", "a", "")]
    assert changes([pool("a", 3, 4, age_s=1.0)], [full, worker(2)]) == []
    assert changes([waiting], [full, worker(2, running=4)]) == []
    assert changes([waiting], [full, worker(2, {"a": LOADING}), worker(3)]) == []
    assert changes([waiting], [full, worker(2, {"b": OLD}, room=1)]) == [("w2", "a", "b")]
    assert changes([waiting, pool("b", 1, 1)], [full, worker(2, {"b": OLD}, room=1)]) == []


def test_a_load_that_is_late_is_not_waited_for() -> None:
    """Its place may be held by running jobs of the adapter before. Another worker is asked, but no turn ended."""
    late = worker(1, {"a": HeldAdapter(LATE_S, None)})
    assert changes([pool("a")], [late, worker(2)]) == [("w2", "a", "")]
    assert changes([pool("a")], [worker(1, {"a": HeldAdapter(LATE_S - 1, None)}), worker(2)]) == []
    assert changes([pool("a"), pool("b", 1, 1)], [late, worker(2, {"b": OLD}, room=1)]) == []


def test_workers_that_cannot_load_it_are_not_asked() -> None:
    """Not where it failed lately, is not there, or no adapter has room."""
    assert changes([pool("a")], [worker(1, refused=frozenset("a")), worker(2)]) == [("w2", "a", "")]
    assert changes([pool("a")], [worker(1, loadable=frozenset("bc")), worker(2, room=0)]) == []
    assert changes([pool("a")], [worker(1, loadable=frozenset("ab"), running=3), worker(2)]) == [("w2", "a", "")]


def test_an_adapter_whose_queue_does_not_answer_stays() -> None:
    """What it has is not known."""
    full = worker(1, {"b": OLD}, room=1)
    assert changes([pool("a")], [full], unknown=frozenset("b")) == []


def test_a_round_is_bounded() -> None:
    """In all, and for each worker, also with what it loads already."""
    names = [f"x{number}" for number in range(200)]
    many = [worker(number, loadable=frozenset(names), room=50) for number in range(100)]
    made = changes([pool(name) for name in names], many)
    assert len(made) == len({name for _, name, _ in made}) == MAX_CHANGES
    one = worker(1, {"b": LOADING}, loadable=frozenset(names), room=50)
    assert len(changes([pool(name) for name in names], [one])) == MAX_LOADING - 1
    held = {f"h{number}": OLD for number in range(9)}
    full = worker(1, held, loadable=frozenset(names), room=9)
    assert len(changes([pool(name) for name in names], [full])) == MAX_LOADING


# Many rounds


@dataclass
class Fleet:
    """Workers that load in ``load_s`` and run jobs of ``job_s``; ``arrive`` says how many come in a second."""

    count: int
    room: int
    arrive: Callable[[str, int], int]
    load_s: int = 1
    job_s: int = 1
    slots: int = 4
    broken: frozenset[tuple[str, str]] = frozenset()
    now: int = 0
    waiting: dict[str, deque[int]] = field(default_factory=lambda: {name: deque() for name in NAMES})
    held: dict[str, dict[str, tuple[int, int | None]]] = field(default_factory=dict)
    """By worker: when each adapter was told, and was loaded."""
    draining: dict[str, set[str]] = field(default_factory=dict)
    running: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    """By worker: when each job ends, and its adapter."""
    needed_at: dict[str, int] = field(default_factory=dict)
    unserved: dict[str, int] = field(default_factory=dict)
    longest_unserved: int = 0
    stays: list[int] = field(default_factory=list)
    """For how long each adapter that was unloaded was loaded."""
    loads: int = 0

    def __post_init__(self) -> None:
        for number in range(self.count):
            self.held[f"w{number}"], self.draining[f"w{number}"], self.running[f"w{number}"] = {}, set(), []

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self._second()

    def _second(self) -> None:
        self.now += 1
        for name in NAMES:
            self.waiting[name].extend([self.now] * self.arrive(name, self.now))
        for one, held in self.held.items():
            self.running[one] = [job for job in self.running[one] if job[0] > self.now]
            self.draining[one] &= {name for _, name in self.running[one]}
            for name, (told, loaded) in held.items():
                has_room = sum(1 for at in held.values() if at[1] is not None) + len(self.draining[one]) < self.room
                if loaded is None and self.now - told >= self.load_s and has_room and (one, name) not in self.broken:
                    held[name] = (told, self.now)
            # Each adapter in turn.
            ready = [name for name, (_, loaded) in held.items() if loaded is not None]
            while len(self.running[one]) < self.slots and (mine := [name for name in ready if self.waiting[name]]):
                name = min(mine, key=lambda name: self.waiting[name][0])
                self.waiting[name].popleft()
                self.running[one].append((self.now + self.job_s, name))
            assert len(ready) + len(self.draining[one]) <= self.room
        self._decide()

    def _decide(self) -> None:
        told = {name for held in self.held.values() for name in held}
        pools = []
        for name in NAMES:
            waiting = len(self.waiting[name])
            leased = sum(job[1] == name for jobs in self.running.values() for job in jobs)
            if waiting or leased:
                self.needed_at[name] = self.now
            self.unserved[name] = self.unserved.get(name, 0) + 1 if waiting and name not in told else 0
            age = float(self.now - self.waiting[name][0]) if waiting else 0.0
            pools.append(pool(name, waiting, leased, age_s=age, late_s=age, unserved_s=float(self.unserved[name])))
        self.longest_unserved = max(self.longest_unserved, *self.unserved.values())
        idle = {name: float(self.now - at) for name, at in self.needed_at.items()}
        for change in assign_adapters(pools, [self._worker(one) for one in self.held], idle):
            held = self.held[change.worker_id]
            if change.instead_of:
                loaded = held.pop(change.instead_of)[1]
                assert loaded is not None
                self.stays.append(self.now - loaded)
                if any(name == change.instead_of for _, name in self.running[change.worker_id]):
                    self.draining[change.worker_id].add(change.instead_of)
            assert change.adapter not in held
            held[change.adapter] = (self.now, None)
            self.loads += 1
            assert len(held) <= self.room

    def _worker(self, one: str) -> AdapterWorker:
        held = {
            name: HeldAdapter(self.now - told, None if loaded is None else loaded - told)
            for name, (told, loaded) in self.held[one].items()
        }
        return AdapterWorker(
            worker_id=one,
            loadable=LOADABLE,
            room=self.room,
            slots=self.slots,
            running=len(self.running[one]),
            held=held,
            refused=frozenset(name for worker, name in self.broken if worker == one),
        )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 6)), min_size=1, max_size=12),
    st.integers(1, 20),
    st.integers(1, 4),
)
def test_any_load_keeps_adapters_for_their_stay_and_starves_none(
    count: int, room: int, phases: list[tuple[str, int]], phase_s: int, load_s: int
) -> None:
    """Demand that jumps between adapters in any rhythm: no adapter leaves before its stay is over, no worker holds more
    than it has room for, and each adapter with waiting jobs has a worker within a turn for each other one."""

    def arrive(name: str, now: int) -> int:
        wanted, rate = phases[now // phase_s % len(phases)]
        return rate if name == wanted else 0

    fleet = Fleet(count, room, arrive, load_s=load_s)
    fleet.run(300)
    assert min(fleet.stays, default=99) >= STAY_S
    assert fleet.longest_unserved <= (len(NAMES) - 1) * (TURN_S + load_s + fleet.job_s + 2)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.tuples(*[st.integers(0, 2)] * len(NAMES)))
def test_steady_load_with_room_for_all_comes_to_rest(count: int, rates: tuple[int, ...]) -> None:
    """Each adapter is loaded, and nothing moves any more."""
    fleet = Fleet(count, len(NAMES), lambda name, _: rates[NAMES.index(name)])
    fleet.run(60)
    settled = fleet.loads
    fleet.run(120)
    assert fleet.loads == settled or sum(rates) * fleet.job_s > count * fleet.slots
    assert fleet.stays == []


def test_two_adapters_in_turns_on_one_place() -> None:
    """A request for one and then the other, each second: each stays ``STAY_S``, and both are answered."""
    fleet = Fleet(1, 1, lambda name, now: int(name == "ab"[now % 2]))
    fleet.run(600)
    assert 600 / (2 * TURN_S) <= fleet.loads <= 600 / STAY_S
    assert max(len(waiting) for waiting in fleet.waiting.values()) <= TURN_S + 5


def test_a_broken_adapter_costs_others_nothing() -> None:
    """It is loaded nowhere; the other one is served all the time."""
    fleet = Fleet(2, 1, lambda name, now: int(name in "ab"), broken=frozenset({("w0", "b"), ("w1", "b")}))
    fleet.run(100)
    assert fleet.loads <= 2
    assert len(fleet.waiting["a"]) <= 3


# A large fleet


def test_a_round_of_a_large_fleet_takes_time_for_its_size_only() -> None:
    """1,000 workers that hold 8 of 1,000 adapters each: four times the fleet takes far less than 16 times as long,
    however the places are taken."""

    def round_s(size: int, had_turn: bool) -> float:
        names = [f"adapter-{number}" for number in range(size)]
        loadable, since = frozenset(names), HeldAdapter(500.0 if had_turn else 10.0, 0.5)
        workers = [
            worker(n, {names[(8 * n + k) % size]: since for k in range(8)}, loadable=loadable, room=8, running=4)
            for n in range(size)
        ]
        pools = [pool(name, 5, 5, age_s=9.0, unserved_s=9.0) for name in names]
        pools += [pool(f"other-{number}", 1, unserved_s=9.0) for number in range(size)]
        best = 1e9
        for _ in range(3):
            began = time.process_time()
            assign_adapters(pools, workers, {})
            best = min(best, time.process_time() - began)
        return best

    for had_turn in (False, True):
        small, large = round_s(250, had_turn), round_s(1_000, had_turn)
        assert large < 9 * small
