"""Routers that push: who gets the next request."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from scheduling.slots import EngineLoad
from simulator.clock import Clock
from simulator.engines import Engine
from simulator.fleet import Worker
from simulator.policies import POLICIES, Policy, PolicyContext, QueueRules
from simulator.requests import Request, TraceRequest


class Idle:
    """An engine that never ends anything."""

    def submit(self, request: Request) -> None:
        raise AssertionError("the policy sends requests by its dispatch alone")

    def abort(self, request: Request, stopped: Callable[[Request], None]) -> None:
        stopped(request)

    def load(self) -> EngineLoad:
        return EngineLoad(waiting=0)


class Sent:
    """A policy with ``count`` workers, and what it sent where."""

    def __init__(self, name: str, count: int) -> None:
        self.to: list[int] = []
        context = PolicyContext(Clock(), self._send, lambda _: None, 0.0, 512)
        self.policy: Policy = POLICIES[name].make(context, QueueRules())
        engine: Engine = Idle()
        self.workers = [Worker(number, engine, 2, 0.0) for number in range(count)]
        for worker in self.workers:
            worker.ready = True
            self.policy.joined(worker)

    def _send(self, worker: Worker, request: Request) -> None:
        worker.running += 1
        self.to.append(worker.number)

    def arrive(self, *blocks: int) -> int:
        """Where the next request goes."""
        self.policy.arrive(Request(len(self.to), TraceRequest(0.0, 600, 1, blocks), 0.0))
        return self.to[-1]

    def end(self, number: int) -> None:
        worker = self.workers[number]
        worker.running -= 1
        self.policy.ended(Request(0, TraceRequest(0.0, 1, 1), 0.0), worker)


def test_round_robin_takes_turns() -> None:
    """Whatever they have to do; one that leaves is passed over."""
    sent = Sent("round-robin", 3)
    assert [sent.arrive() for _ in range(4)] == [0, 1, 2, 0]
    sent.policy.left(sent.workers[1])
    assert [sent.arrive() for _ in range(3)] == [2, 0, 2]


def test_the_least_loaded_is_chosen() -> None:
    """Among equals the one that has waited longest."""
    sent = Sent("least-loaded", 3)
    assert [sent.arrive() for _ in range(4)] == [0, 1, 2, 0]
    sent.end(2)
    assert [sent.arrive() for _ in range(2)] == [2, 1]
    sent.policy.left(sent.workers[2])
    sent.end(0)
    assert sent.arrive() == 0


def test_a_conversation_stays_until_its_worker_has_more_than_its_share() -> None:
    """Consistent hashing, bounded: of ten equal requests on two workers one has at most 1.25 times the average."""
    sent = Sent("bounded-hashing", 2)
    home = sent.arrive(0, 7)
    sent.end(home)
    assert {sent.arrive(0, 7, number) for number in range(1)} == {home}
    for number in range(9):
        sent.arrive(0, 7, number)
    assert sorted(worker.running for worker in sent.workers) in ([4, 6], [3, 7])
    assert max(worker.running for worker in sent.workers) <= 7


def test_few_conversations_move_when_a_worker_comes() -> None:
    """That is what consistent hashing is for."""
    before, after = Sent("bounded-hashing", 4), Sent("bounded-hashing", 5)

    def homes(sent: Sent) -> list[int]:
        found = []
        for number in range(300):
            found.append(sent.arrive(0, number))
            sent.end(found[-1])
        return found

    moved = sum(one != other for one, other in zip(homes(before), homes(after), strict=True))
    assert 300 / 5 * 0.5 < moved < 300 / 5 * 1.6


@pytest.mark.parametrize("name", list(POLICIES))
def test_requests_wait_for_the_first_worker(name: str) -> None:
    """None is lost while there is no worker."""
    sent = Sent(name, 0)
    arrive: Callable[[Request], None] = sent.policy.arrive
    for number in range(2):
        arrive(Request(number, TraceRequest(0.0, 1, 1), 0.0))
    assert sent.policy.waiting == 2
    sent.policy.joined(Worker(0, Idle(), 2, 0.0))
    assert (sent.policy.waiting, sent.to) == (0, [0, 0])
