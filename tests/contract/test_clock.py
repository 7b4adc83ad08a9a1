"""The clock of Redis steps, while it runs or with a restart: durations go on as they were."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from broker import Broker, BrokerSettings
from broker.redis.server_clock import ServerClocks
from queue_schemas import Frame, Lane, Marker, MarkerKind, Outcome, PersistOptions, Settled, State, new_session_id
from tests.support.clocks import HOUR_S, SteppedServer, faketime_library
from tests.support.queue import MODEL, Puller, answer_frame, make_job
from tests.support.servers import server_binary
from tests.support.waiting import eventually

pytestmark = pytest.mark.skipif(faketime_library() is None, reason="Debian's faketime is not installed")

TTL_MS = 3_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SteppedServer]:
    """A server whose clock can be moved: Valkey, because the allocator of Debian's Redis and faketime collide."""
    server = SteppedServer(server_binary(), tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def broker(server: SteppedServer) -> AsyncIterator[Broker]:
    """A broker on it."""
    broker = await Broker.connect(BrokerSettings(redis_url=server.url))
    yield broker
    await broker.close()


def live(server: SteppedServer, seconds: int) -> None:
    """The clock steps under the running server."""
    server.step_to(seconds)


def restart(server: SteppedServer, seconds: int) -> None:
    """The server is killed, and comes back with another clock."""
    time.sleep(1.1)  # what is not on the disk by then is lost with a kill
    server.kill()
    server.step_to(seconds)
    server.start()


@pytest.mark.parametrize("happens", [live, restart])
@pytest.mark.parametrize("seconds", [HOUR_S, -HOUR_S])
async def test_durations_survive_a_step(
    server: SteppedServer, broker: Broker, seconds: int, happens: Callable[[SteppedServer, int], None]
) -> None:
    """[G9] An hour ahead or behind: what waits and runs goes on with the time that it had, its Router is there, what is
    kept stays, the acting Manager stays it, deadlines are held, and a dead Manager is replaced."""
    news: list[Frame | Marker] = []
    router = new_session_id("router")
    reading = asyncio.create_task(broker.replies.read(router, news.extend))
    await asyncio.wait_for(broker.replies.ready.wait(), 10)
    worker = await Puller(broker).join()
    running, waiting = (make_job(reply_to=router, ttl_ms=600_000) for _ in "ab")
    assert await broker.jobs.enqueue(running) is State.QUEUED
    lease = await worker.claim_one()
    assert await broker.jobs.enqueue(waiting) is State.QUEUED
    stored = make_job(tenant="keeper", lane=Lane.BACKGROUND, persisted=True, idempotency_key="k", ttl_ms=600_000)
    await broker.jobs.enqueue_persisted(stored, PersistOptions(600_000, background=True))
    term = await broker.fleet.acquire_leader_lease("one", TTL_MS)
    assert term
    await broker.maintenance.expire()

    happens(server, seconds)

    swept = await broker.maintenance.expire()
    assert (swept.expired, swept.forgotten) == (0, 0)
    assert await broker.fleet.acquire_leader_lease("two", TTL_MS) is None
    assert await broker.fleet.acquire_leader_lease("one", TTL_MS) == term
    if worker.session_id not in await broker.maintenance.renewal_counters():
        pytest.fail("the worker is not known any more")
    await broker.workers.renew(worker.session_id)
    assert (await broker.stats.depths())[MODEL][Lane.INTERACTIVE].waiting == 1
    assert await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.OK
    second = await worker.claim_one(lanes=[Lane.INTERACTIVE])
    assert second.job == waiting
    assert 580_000 < second.remaining_ms <= 600_000
    assert await broker.attempts.settle(second, Outcome.DONE, answer_frame(second)) is Settled.OK
    await eventually(lambda: len([item for item in news if isinstance(item, Frame)]) == 2, "both answers arrive")
    kept = await broker.persisted_jobs.get(stored.id)
    assert kept is not None
    assert 580_000 < kept.deadline_ms - kept.now_ms <= 600_000

    late = make_job(reply_to=router, ttl_ms=1_500)
    began = time.monotonic()
    assert await broker.jobs.enqueue(late) is State.QUEUED

    async def expired() -> bool:
        await broker.maintenance.expire()
        return any(isinstance(item, Marker) and item.kind is MarkerKind.EXPIRED for item in news)

    await eventually(expired, "its deadline is held", every_s=0.1)
    assert 1.2 < time.monotonic() - began < 5

    async def taken_over() -> bool:
        return await broker.fleet.acquire_leader_lease("two", TTL_MS) == term + 1

    await eventually(taken_over, "the Manager that acted is silent", every_s=0.2)
    assert time.monotonic() - began > TTL_MS / 1000 * 0.3
    reading.cancel()
    with suppress(asyncio.CancelledError):
        await reading


async def test_a_silent_manager_is_replaced_though_the_clock_was_set_back(
    server: SteppedServer, broker: Broker
) -> None:
    """[G9] The Manager dies and the clock goes back an hour: another takes over after the lease, not after the hour."""
    term = await broker.fleet.acquire_leader_lease("one", TTL_MS)
    server.step_to(-HOUR_S)

    async def taken_over() -> bool:
        return await broker.fleet.acquire_leader_lease("two", TTL_MS) == (term or 0) + 1

    began = time.monotonic()
    await eventually(taken_over, "it takes over", every_s=0.2)
    assert time.monotonic() - began > 1


def test_time_that_was_measured_counts() -> None:
    """[G9] Who saw the queue's clock and measured ten minutes says that it is ten minutes later."""
    now = 100.0
    clocks = ServerClocks(lambda: now)
    assert clocks.at_least(0) == 0
    clocks.saw(0, 50_000, 1_000_000)
    now += 600
    assert 649_000 < clocks.at_least(0) <= 650_000


async def test_an_outage_counts_for_deadlines(server: SteppedServer, broker: Broker) -> None:
    """[G9] A server that was away for longer than it believes possible is told so by who sweeps: time does not stand
    still with it."""
    await broker.maintenance.expire()
    job = make_job(ttl_ms=60_000)
    assert await broker.jobs.enqueue(job) is State.QUEUED
    broker.maintenance._clock._clock = lambda: time.monotonic() + 61
    assert (await broker.maintenance.expire()).expired == 1
