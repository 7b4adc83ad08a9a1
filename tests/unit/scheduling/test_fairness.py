"""Tenants share by tokens: the pure counters, in any order of arrivals, sizes and ends."""

from __future__ import annotations

from collections import defaultdict, deque

from hypothesis import given, settings
from hypothesis import strategies as st

from scheduling.fairness import Band, bound, charge_of


class Server:
    """Slots that serve one band: each job has an estimate, by which it is charged, and what it costs in the end."""

    def __init__(self, slots: int, weights: dict[str, float]) -> None:
        self.band = Band()
        self.weights = weights
        self.slots = slots
        self.running: deque[tuple[str, float, int]] = deque()
        self.queues: dict[str, deque[tuple[int, int]]] = defaultdict(deque)
        self.served: dict[str, float] = defaultdict(float)
        """What each tenant was given, over its weight: what its jobs cost in the end, from their start on."""

    def send(self, tenant: str, estimate: int, cost: int) -> None:
        self.queues[tenant].append((estimate, cost))
        self.band.come(tenant)

    def step(self) -> str | None:
        """The oldest job ends if no slot is free; then one starts. Answers whose."""
        if len(self.running) == self.slots:
            tenant, charged, cost = self.running.popleft()
            self.band.correct(tenant, charge_of(cost, self.weights[tenant]) - charged)
        tenant_next = self.band.next()
        if tenant_next is None:
            return None
        estimate, cost = self.queues[tenant_next].popleft()
        weight = self.weights[tenant_next]
        charged = charge_of(estimate, weight)
        self.band.charge(tenant_next, charged)
        if not self.queues[tenant_next]:
            self.band.leave(tenant_next)
        self.running.append((tenant_next, charged, cost))
        self.served[tenant_next] += cost / weight
        return tenant_next


sizes = st.integers(1, 5_000)


@settings(max_examples=200, deadline=None)
@given(
    slots=st.integers(1, 8),
    weights=st.tuples(st.sampled_from([0.5, 1.0, 4.0]), st.sampled_from([1.0, 2.0])),
    jobs=st.lists(st.tuples(sizes, sizes, sizes, sizes), min_size=20, max_size=60),
)
def test_two_tenants_that_wait_are_never_further_apart_than_the_bound(
    slots: int, weights: tuple[float, float], jobs: list[tuple[int, int, int, int]]
) -> None:
    """Whatever their requests were thought to cost, and cost in the end: VTC's bound."""
    shares = dict(zip("ab", weights, strict=True))
    server = Server(slots, shares)
    for estimate_a, cost_a, estimate_b, cost_b in jobs:
        server.send("a", estimate_a, cost_a)
        server.send("b", estimate_b, cost_b)
    largest = max(max(job[:2]) / shares["a"] for job in jobs), max(max(job[2:]) / shares["b"] for job in jobs)
    while server.queues["a"] and server.queues["b"]:
        server.step()
        apart = abs(server.served["a"] - server.served["b"])
        assert apart <= bound(max(largest), slots) + 1


def test_a_flood_does_not_take_others_turns() -> None:
    """Of ten times the load, a tenant is served no more than its share while the other waits."""
    server = Server(4, {"flood": 1.0, "calm": 1.0})
    for _ in range(1_000):
        server.send("flood", 100, 100)
    for _ in range(100):
        server.send("calm", 100, 100)
    turns = [server.step() for _ in range(200)]
    assert 95 <= turns.count("calm") <= 100


def test_huge_prompts_are_paid_by_who_sends_them() -> None:
    """A tenant whose requests are a hundred times as large gets one for a hundred of the other's."""
    server = Server(4, {"huge": 1.0, "small": 1.0})
    for _ in range(50):
        server.send("huge", 10_000, 10_000)
    for _ in range(2_000):
        server.send("small", 100, 100)
    turns = [server.step() for _ in range(1_010)]
    assert 9 <= turns.count("huge") <= 12


def test_an_estimate_that_is_too_low_gains_nothing() -> None:
    """Who says that each answer is one token pays for what was written."""
    server = Server(2, {"liar": 1.0, "honest": 1.0})
    for _ in range(500):
        server.send("liar", 1, 1_000)
        server.send("honest", 1_000, 1_000)
    turns = [server.step() for _ in range(400)]
    assert abs(turns.count("liar") - turns.count("honest")) <= 8


def test_idle_time_earns_nothing() -> None:
    """A tenant that comes after long is served in turns with the others, not ahead of them."""
    server = Server(1, {"old": 1.0, "new": 1.0})
    for _ in range(300):
        server.send("old", 100, 100)
    for _ in range(100):
        server.step()
    for _ in range(100):
        server.send("new", 100, 100)
    turns = [server.step() for _ in range(40)]
    assert 19 <= turns.count("new") <= 21


def test_leaving_and_coming_back_gains_nothing() -> None:
    """One whose queue is empty between its requests stands where it stood."""
    server = Server(1, {"comes": 1.0, "stays": 1.0})
    for _ in range(200):
        server.send("stays", 100, 100)
    turns = []
    for _ in range(100):
        if not server.queues["comes"]:
            server.send("comes", 300, 300)
        turns.append(server.step())
    assert 24 <= turns.count("comes") <= 27


def test_debt_of_a_tenant_that_left_is_remembered() -> None:
    """Its answer turned out to be long after its last request was taken: it stands behind when it comes back."""
    band = Band()
    band.come("a")
    band.come("b")
    band.charge("a", 10)
    band.leave("a")
    band.correct("a", 500)
    band.come("a")
    assert band.waiting["a"] == 510
    band.charge("b", 100)
    assert band.next() == "b"
