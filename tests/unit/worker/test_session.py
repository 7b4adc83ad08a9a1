"""A worker session against a queue that answers with surprises."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import pytest

from broker import Broker, Undelivered
from queue_schemas import (
    Assignment,
    BrokerFull,
    BrokerUnavailable,
    Claimed,
    Control,
    ControlKind,
    EngineState,
    Fenced,
    Heartbeat,
    HeartbeatAnswer,
    InferqError,
    Lane,
    PoolAssignment,
    Registration,
    RegistrationAnswer,
    SessionId,
    Settled,
)
from queue_schemas.fleet.model_cards import Card
from telemetry import MetricsRegistry
from telemetry.backoff import Backoff
from tests.support.waiting import eventually
from worker import WorkerSettings, lease_renewals, service, shard_consumer
from worker import session as session_module
from worker.context import WorkerContext
from worker.core import slots as slots_module
from worker.engines import Engine
from worker.metrics import WorkerMetrics
from worker.registration.manager_client import ManagerClient
from worker.session import WorkerSession

ASSIGNMENT = Assignment(term=1, version=1, pools=[PoolAssignment(pool="m", shard=0, lanes=list(Lane))])
REGISTERED = RegistrationAnswer(
    broker_url="redis://r", shards=1, lease_ms=100, heartbeat_interval_ms=100, assignment=ASSIGNMENT
)


LOOPS = ("join", "claim", "read_control", "renew", "reconcile_leases", "leader_lease_until")


class Manager:
    url = "http://manager"

    def __init__(self, registered: RegistrationAnswer) -> None:
        self._registered = registered

    def turn(self) -> None: ...

    async def register(self, registration: Registration) -> RegistrationAnswer:
        return self._registered

    async def heartbeat(self, worker_id: str, heartbeat: Heartbeat) -> HeartbeatAnswer:
        return HeartbeatAnswer(assignment=ASSIGNMENT)

    async def deregister(self, worker_id: str, session_id: SessionId) -> None: ...

    async def hold_session_connection(self, worker_id: str, session_id: SessionId) -> None:
        await asyncio.Event().wait()


class IdleEngine:
    state, detail, models = EngineState.READY, "", ("m",)
    cards: Mapping[str, Card] = {}

    async def progress(self) -> int | None:
        return 0

    async def load(self) -> None:
        return None


class SurprisingBroker:
    """Each kind of call fails once with an error nobody foresaw; ``fenced`` is the call that says it is all over."""

    shards = 1

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.workers = self.attempts = self.fleet = self
        self.fenced = ""
        self.pings = 0

    def _called(self, name: str) -> None:
        self.calls[name] += 1
        if self.fenced == name:
            raise Fenced("declared dead")
        if self.calls[name] == 1:
            raise InferqError("a reply that nobody foresaw")

    async def join(self, session_id: SessionId) -> set[int]:
        self._called("join")
        return set()

    async def renew(self, session_id: SessionId) -> None:
        self._called("renew")

    def renewer_apart(self) -> SurprisingBroker:
        return self

    async def close(self) -> None: ...

    async def leader_lease_until(self) -> int:
        self._called("leader_lease_until")
        return self.calls["leader_lease_until"]

    async def claim(self, *arguments: Any, **offer: Any) -> Claimed:
        self._called("claim")
        return Claimed(parked=arguments[4] > 0, offered=offer.get("offer", 0))

    async def read_control(self, *arguments: Any) -> list[Any]:
        self._called("read_control")
        await asyncio.sleep(0.01)
        if self.pings:
            self.pings -= 1
            return [("1-1", Control(ControlKind.PING))]
        return []

    async def reconcile_leases(self, *arguments: Any) -> set[str]:
        self._called("reconcile_leases")
        return set()

    async def append(self, *arguments: Any) -> Settled:
        return Settled.OK

    async def publish(self, *arguments: Any) -> dict[str, Undelivered]:
        return {}

    async def leave(self, session_id: SessionId) -> None: ...


class SlowToRenew(SurprisingBroker):
    """The first renewal's reply takes its time; ``next_after_s`` is how long after it the next renewal comes."""

    def __init__(self, reply_after_s: float) -> None:
        super().__init__()
        self.next_after_s: float | None = None
        self._reply_after_s = reply_after_s
        self._replied_at = 0.0

    async def renew(self, session_id: SessionId) -> None:
        now = asyncio.get_running_loop().time
        if not self._replied_at:
            await asyncio.sleep(self._reply_after_s)
            self._replied_at = now()
        elif self.next_after_s is None:
            self.next_after_s = now() - self._replied_at


class SlowToClaim(SurprisingBroker):
    """The first claim is not answered; meanwhile the control stream is lost and found. ``order``: what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []

    async def claim(self, *arguments: Any, **offer: Any) -> Claimed:
        self.order.append("claim")
        if len(self.order) == 1:
            await eventually(lambda: self.calls["read_control"] > 2, "the control stream is read again")
        return await super().claim(*arguments, **offer)

    async def reconcile_leases(self, *arguments: Any) -> set[str]:
        self.order.append("reconcile_leases")
        return await super().reconcile_leases(*arguments)


def session_on(
    broker: SurprisingBroker, registered: RegistrationAnswer = REGISTERED, **settings: object
) -> tuple[WorkerSession, asyncio.Event]:
    async def connect(answer: RegistrationAnswer) -> Broker:
        return cast(Broker, broker)

    drain = asyncio.Event()
    context = WorkerContext(
        settings=WorkerSettings.load(engine="sim", worker_id="w1", **settings),
        engine=cast(Engine, IdleEngine()),
        client=cast(ManagerClient, Manager(registered)),
        metrics=WorkerMetrics(MetricsRegistry("worker")),
        url=None,
        connect=connect,
        drain=drain,
    )
    return WorkerSession(context, SessionId("w1.0123456789abcdef")), drain


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "_JOIN_PAUSE_S", 0.02)
    monkeypatch.setattr(shard_consumer, "_BACKOFF", Backoff(0.01, 0.02))
    monkeypatch.setattr(shard_consumer, "_RETRY_S", 0.02)
    monkeypatch.setattr(service, "_BACKOFF", Backoff(0.01, 5.0))


async def test_an_unforeseen_error_of_the_queue_costs_a_pause_not_the_process() -> None:
    """Joining, claiming, listening, renewing, reconciling leases and watching the Manager all go on after an
    unforeseen error."""
    broker = SurprisingBroker()
    session, drain = session_on(broker)
    running = asyncio.create_task(session.run(first=True))

    def all_went_on() -> bool:
        assert not running.done(), running.exception()
        return session.broker_ok and all(broker.calls[name] > 1 for name in LOOPS)

    await eventually(all_went_on, "every loop has called again")
    drain.set()
    await asyncio.wait_for(running, 10)


async def test_a_parked_worker_parks_again_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the queue counts it as gone: neither a message nor the sweep is needed."""
    monkeypatch.setattr(session_module, "SWEEP_S", 3_600)
    monkeypatch.setattr(slots_module, "PARK_AGAIN_S", 0.005)
    broker = SurprisingBroker()
    session, drain = session_on(broker)
    running = asyncio.create_task(session.run(first=True))
    await eventually(lambda: broker.calls["claim"] >= 10, "it claims again and again")
    monkeypatch.setattr(slots_module, "PARK_AGAIN_S", 20.0)
    await eventually(lambda: session.slots.due_at(0) is not None, "it is parked")
    drain.set()
    await running


async def test_a_renewal_that_was_long_under_way_is_followed_by_the_next_at_once() -> None:
    """Its number rose when it was sent: a whole interval more of waiting would use the lease up."""
    interval_s = 0.4
    lease_ms = int(interval_s * lease_renewals.RENEWALS_PER_LEASE * 1000)
    broker = SlowToRenew(interval_s + 0.05)
    session, drain = session_on(broker, REGISTERED.model_copy(update={"lease_ms": lease_ms}))
    running = asyncio.create_task(session.run(first=True))
    await eventually(lambda: broker.next_after_s is not None, "two renewals")
    assert broker.next_after_s is not None
    assert broker.next_after_s < interval_s * 0.9
    drain.set()
    await asyncio.wait_for(running, 10)


async def test_leases_are_compared_when_no_claim_is_unanswered() -> None:
    """What an unanswered claim gave is not known yet: it would be taken back, though its repeat could bring it."""
    broker = SlowToClaim()
    session, drain = session_on(broker)
    running = asyncio.create_task(session.run(first=True))
    await eventually(lambda: "reconcile_leases" in broker.order, "leases are compared")
    assert broker.order[:3] == ["claim", "claim", "reconcile_leases"]
    drain.set()
    await asyncio.wait_for(running, 10)


@pytest.mark.parametrize("call", ["join", "claim", "renew", "reconcile_leases"])
async def test_being_fenced_ends_the_session(call: str) -> None:
    """Declared dead is declared dead: it is not tried again."""
    broker = SurprisingBroker()
    broker.fenced = call
    session, _ = session_on(broker)
    with pytest.raises(ExceptionGroup) as failure:
        await asyncio.wait_for(session.run(first=True), 10)
    assert failure.value.split(Fenced)[1] is None
    assert broker.calls[call] == 1


async def test_leases_are_kept_while_the_serving_loop_is_blocked_and_not_for_ever() -> None:
    """A loop that stands still for many leases costs none of them; one that does for longer than its limit loses them,
    and once it turns again they are kept again."""
    broker = SurprisingBroker()
    session, drain = session_on(broker, loop_stall_timeout_ms=1_000)
    running = asyncio.create_task(session.run(first=True))
    await eventually(lambda: broker.calls["renew"] > 2, "it renews")
    before = broker.calls["renew"]
    time.sleep(0.9)  # noqa: ASYNC251 - the block is what is tested
    while_blocked = broker.calls["renew"]
    assert while_blocked > before
    time.sleep(0.7)  # noqa: ASYNC251
    stuck = broker.calls["renew"]
    time.sleep(0.7)  # noqa: ASYNC251
    assert broker.calls["renew"] == stuck
    await eventually(lambda: broker.calls["renew"] > stuck, "it renews again")
    drain.set()
    await running


async def test_a_ping_is_answered_at_once_also_by_a_blocked_loop() -> None:
    """A loop that is too busy to see a ping is one whose number rises without it, well within a ping's time."""
    broker = SurprisingBroker()
    registered = REGISTERED.model_copy(update={"lease_ms": 600_000})
    session, drain = session_on(broker, registered=registered)
    running = asyncio.create_task(session.run(first=True))
    await eventually(lambda: broker.calls["renew"] > 1, "it has renewed")
    before = broker.calls["renew"]
    broker.pings = 1
    await eventually(lambda: broker.calls["renew"] > before, "the ping is answered", limit_s=5)
    before = broker.calls["renew"]
    time.sleep(0.6)  # noqa: ASYNC251 - the block is what is tested
    assert broker.calls["renew"] > before
    drain.set()
    await running


async def test_a_ping_brings_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever pings may have something to tell, which heartbeats' answers do."""
    heartbeats: list[str] = []

    async def heartbeat(self: Manager, worker_id: str, heartbeat: Heartbeat) -> HeartbeatAnswer:
        heartbeats.append(worker_id)
        return HeartbeatAnswer(assignment=ASSIGNMENT)

    monkeypatch.setattr(Manager, "heartbeat", heartbeat)
    broker = SurprisingBroker()
    registered = REGISTERED.model_copy(update={"heartbeat_interval_ms": 600_000})
    session, drain = session_on(broker, registered=registered)
    running = asyncio.create_task(session.run(first=True))
    await eventually(lambda: session.broker_ok and heartbeats, "it has told that it reaches the queue")
    known = len(heartbeats)
    broker.pings = 1
    await eventually(lambda: len(heartbeats) > known, "it sends another one", limit_s=5)
    drain.set()
    await running


async def test_a_queue_that_is_away_or_full_at_the_start_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that starts in the middle of trouble gets its queue once the trouble is over."""
    troubles: list[InferqError] = [BrokerUnavailable("away"), BrokerFull("full")]

    class Opened:
        round_trips = 0

    async def connect(settings: object) -> Opened:
        if troubles:
            raise troubles.pop(0)
        return Opened()

    monkeypatch.setattr(service.Broker, "connect", connect)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        worker = service.Worker(WorkerSettings.load(engine="sim"), listener, cast(Engine, IdleEngine()))
        assert isinstance(await asyncio.wait_for(worker._connect(REGISTERED), 10), Opened)
    assert not troubles
