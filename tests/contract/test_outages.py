"""Redis goes away and comes back: calls wait within their limit, nothing acknowledged is lost, nobody hangs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from broker import Broker, BrokerSettings
from queue_schemas import BrokerUnavailable, Frame, Marker, Outcome, Settled, State, new_session_id
from tests.support.fault_proxy import FaultProxy
from tests.support.queue import Puller, answer_frame, make_job
from tests.support.servers import Server, server_binary
from tests.support.waiting import eventually


@pytest.fixture(params=["valkey", "redis7"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """A server of this test alone, to be killed."""
    binary = server_binary(request.param)
    server = Server(binary, tmp_path / "server", ("--appendfsync", "always")).start()
    yield server
    server.stop()


@pytest.fixture
async def broker(server: Server) -> AsyncIterator[Broker]:
    """A broker with limits of seconds, as short as the tests are."""
    settings = BrokerSettings(
        redis_url=server.url, retry_limit_ms=10_000, command_timeout_ms=1_000, connect_timeout_ms=500
    )
    broker = await Broker.connect(settings)
    yield broker
    await broker.close()


async def test_flushed_scripts_are_loaded_again(server: Server, broker: Broker) -> None:
    """After SCRIPT FLUSH (or a failover) the first call sends its script along, and nothing is noticed."""
    worker = await Puller(broker).join()
    for _ in range(3):
        server.ask("SCRIPT", "FLUSH")
        await broker.jobs.enqueue(make_job())
        server.ask("SCRIPT", "FLUSH")
        lease = await worker.claim_one()
        server.ask("SCRIPT", "FLUSH")
        assert await broker.attempts.settle(lease, Outcome.DONE) is Settled.OK


async def test_calls_wait_for_a_server_that_comes_back(server: Server, broker: Broker) -> None:
    """kill -9 in the middle: concurrent calls are retried until the server is back, and none is lost or doubled."""
    await broker.jobs.enqueue(make_job())
    server.kill()
    jobs = [make_job() for _ in range(50)]
    calls = [asyncio.create_task(broker.jobs.enqueue(job)) for job in jobs]
    await asyncio.sleep(0.2)
    assert not any(call.done() for call in calls)
    server.start()
    async with asyncio.timeout(10):
        assert await asyncio.gather(*calls) == [State.QUEUED] * 50
    worker = await Puller(broker).join()
    assert len(await worker.claim(100)) == 51


async def test_leases_survive_a_restart_of_the_server(server: Server, broker: Broker) -> None:
    """A job that was running when Redis was killed is settled after it is back: nobody was declared dead."""
    job = make_job()
    await broker.jobs.enqueue(job)
    worker = await Puller(broker).join()
    lease = await worker.claim_one()
    server.restart()
    await broker.workers.renew(worker.session_id)
    assert await broker.attempts.settle(lease, Outcome.DONE) is Settled.OK


async def test_a_server_that_stays_away_is_reported_within_the_limit(server: Server) -> None:
    """Retries have an end: then the caller hears that the queue cannot be reached."""
    broker = await Broker.connect(BrokerSettings(redis_url=server.url, retry_limit_ms=600))
    server.kill()
    begin = time.monotonic()
    with pytest.raises(BrokerUnavailable) as error:
        await broker.jobs.enqueue(make_job())
    assert 0.2 < time.monotonic() - begin < 3
    assert error.value.retry_after_s
    with pytest.raises(BrokerUnavailable):
        await broker.ping()
    await broker.close()


async def test_a_silent_server_is_given_up_and_found_again(server: Server, broker: Broker) -> None:
    """Stopped, not dead: its silence is a time-out, and once it runs again the call succeeds."""
    await broker.ping()
    server.process.pause()
    try:
        with pytest.raises(BrokerUnavailable):
            await broker.ping()
        call = asyncio.create_task(broker.jobs.enqueue(make_job()))
        await asyncio.sleep(0.3)
        assert not call.done()
    finally:
        server.process.resume()
    async with asyncio.timeout(8):
        assert await call is State.QUEUED


async def test_a_router_reads_on_after_a_restart(server: Server, broker: Broker) -> None:
    """The reader reconnects by itself, says at once that answers may be missing; those settled after come."""
    news: list[Frame | Marker] = []
    told: list[int] = []
    router = new_session_id("router")
    reading = asyncio.create_task(broker.replies.read(router, news.extend, told.append))
    async with asyncio.timeout(20):
        await broker.replies.ready.wait()
        await broker.jobs.enqueue(make_job(reply_to=router))
        worker = await Puller(broker).join()
        lease = await worker.claim_one()
        server.kill()
        # Away for longer than the first tries to reach it again take.
        await asyncio.sleep(0.5)
        await asyncio.to_thread(server.start)
        assert await broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.OK
        await eventually(lambda: news, "the answer arrives")
        await eventually(lambda: told == [0], "the Router hears of the restart", limit_s=6)
        assert len(news) == 1
    reading.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await reading


async def test_a_blocked_worker_notices_the_outage(server: Server, broker: Broker) -> None:
    """Reading control messages fails with the queue's own error when the server dies, and works again afterwards."""
    worker = await Puller(broker).join()
    blocked = asyncio.create_task(worker.control_messages(block_ms=8_000))
    await asyncio.sleep(0.1)
    server.kill()
    with pytest.raises(BrokerUnavailable):
        async with asyncio.timeout(4):
            await blocked
    server.start()
    assert await worker.claim() == []
    await broker.jobs.enqueue(make_job())
    assert len(await worker.control_messages(block_ms=2_000)) == 1


async def test_a_cancelled_call_does_not_disturb_others(server: Server) -> None:
    """A caller that gives up while its reply is on the way leaves replies to their owners."""
    async with FaultProxy(server.port) as proxy:
        broker = await Broker.connect(BrokerSettings(redis_url=proxy.url, retry_limit_ms=5_000))
        worker = await Puller(broker).join()
        proxy.latency_s = 0.01
        for turn in range(10):
            given_up = asyncio.create_task(broker.stats.depths())
            await asyncio.sleep(0.002 * turn)
            given_up.cancel()
            job = make_job()
            assert await broker.jobs.enqueue(job) is State.QUEUED
            lease = await worker.claim_one()
            assert lease.job == job
            assert await broker.attempts.settle(lease, Outcome.DONE) is Settled.OK
        await broker.close()


async def test_a_large_job_is_claimed_at_once_over_a_slow_link(server: Server, broker: Broker) -> None:
    """[H52] A reply that takes longer than the limit on commands is neither cut nor asked for again."""
    await (puller := Puller(broker)).join()
    job = make_job(body=b"x" * (1 << 20))
    assert await broker.jobs.enqueue(job) is State.QUEUED
    async with FaultProxy(server.port) as proxy:
        slow = await Broker.connect(BrokerSettings(redis_url=proxy.url, command_timeout_ms=700))
        puller.broker = slow
        proxy.latency_s = 0.15
        began = time.monotonic()
        lease = await puller.claim_one()
        assert time.monotonic() - began > 1.5
        assert lease.job == job
        assert slow.retries == 0
        await slow.close()


async def test_a_cut_line_in_the_middle_of_a_burst_loses_and_doubles_nothing(server: Server) -> None:
    """Connections drop again and again while many enqueue, claim and settle: each job is done exactly once."""
    async with FaultProxy(server.port) as proxy:
        broker = await Broker.connect(BrokerSettings(redis_url=proxy.url, retry_limit_ms=20_000))
        sound = await Broker.connect(BrokerSettings(redis_url=server.url))
        worker = await Puller(broker).join()
        jobs = [make_job() for _ in range(200)]
        done: list[str] = []

        async def pull() -> None:
            while len(done) < len(jobs):
                for lease in await worker.claim(8):
                    assert await broker.attempts.settle(lease, Outcome.DONE) in (Settled.OK, Settled.DUPLICATE)
                    done.append(lease.job.id)

        async def cut() -> None:
            for _ in range(6):
                await asyncio.sleep(0.03)
                proxy.cut()
                await asyncio.sleep(0.01)
                proxy.heal()

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            group.create_task(cut())
            group.create_task(pull())
            for chunk in range(0, 200, 20):
                await asyncio.gather(*map(broker.jobs.enqueue, jobs[chunk : chunk + 20]))
        assert sorted(done) == sorted(job.id for job in jobs)
        assert await sound.stats.depths() == {}
        assert broker.retries > 0
        await broker.close()
        await sound.close()


async def test_a_server_busy_with_a_foreign_script_is_waited_for(server: Server, broker: Broker) -> None:
    """Somebody's slow script makes Redis answer BUSY: calls wait, and nobody takes the server for unfit."""
    server.ask("CONFIG", "SET", "busy-reply-threshold", "50")
    slow = "local n = 0 while n < 60000000 do n = n + 1 end return n"
    blocker = asyncio.create_task(asyncio.to_thread(server.ask, "EVAL", slow, "0"))
    await asyncio.sleep(0.2)
    async with asyncio.timeout(20):
        assert await asyncio.gather(*(broker.jobs.enqueue(make_job()) for _ in range(5))) == [State.QUEUED] * 5
        await blocker


async def test_another_run_of_the_server_is_reported_to_the_router(server: Server, broker: Broker) -> None:
    """After a restart the newest writes may be missing: the Router is told, though its stream is still there."""
    lost: list[int] = []
    router = new_session_id("router")
    reading = asyncio.create_task(broker.replies.read(router, lambda _: None, lost.append))
    async with asyncio.timeout(20):
        await broker.replies.ready.wait()
        server.restart()
        await eventually(lambda: lost == [0], "the router is told")
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
