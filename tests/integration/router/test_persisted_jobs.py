"""Persisted jobs over two Routers, on real sockets and a real Valkey: read anywhere, given up when nobody follows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from queue_schemas import ControlKind, JobId, Lease, ShardKeys
from tests.integration.router.harness import CHAT, SSE, STREAM, RunningRouter, Speaker, running_router
from tests.integration.router.test_serving import DONE, chunk
from tests.support.queue import record_of
from tests.support.servers import Server
from tests.support.sse import read_events
from tests.support.waiting import eventually

KEYS = ShardKeys(0)
BACKGROUND = {"x-inferq-background": "true"}
RESUMABLE = {"x-inferq-resumable": "true"}
GRACE_MS = 300
PIECES = [chunk(text) for text in ("Once ", "upon ", "a ", "time")]


@pytest.fixture
async def routers(valkey: Server) -> AsyncIterator[list[RunningRouter]]:
    """Two of them."""
    options = {"resume_grace_ms": GRACE_MS, "client_stall_timeout_ms": 300, "keepalive_interval_ms": 200}
    async with running_router(valkey.url, **options) as one, running_router(valkey.url, **options) as other:
        yield [one, other]


@pytest.fixture
async def worker(valkey: Server) -> AsyncIterator[Speaker]:
    async with Speaker.join(valkey.url) as worker:
        yield worker


async def say(worker: Speaker, lease: Lease, *pieces: bytes) -> None:
    """A persisted stream goes on."""
    for piece in pieces:
        await worker.broker.attempts.append(lease, worker.frame(lease, piece))


def id_of(event: bytes) -> str:
    return event.rpartition(b"\nid: ")[2].strip().decode()


async def test_a_background_stream_is_read_at_either_router(routers: list[RunningRouter], worker: Speaker) -> None:
    """Asked for at the one; followed at both, live and afterwards; cancelled and deleted at the other."""
    one, other = routers
    async with one.post(STREAM, headers=BACKGROUND) as answer:
        assert answer.status == 202
        path = answer.headers["location"]
    lease = await worker.lease()
    await say(worker, lease, *PIECES[:2])
    async with other.session.get(f"{other.url}{path}/events") as here:
        first = await read_events(here, 2)
        async with one.session.get(f"{one.url}{path}/events", headers={"last-event-id": id_of(first[0])}) as there:
            assert await read_events(there, 1) == first[1:]
            await say(worker, lease, *PIECES[2:])
            assert (await other.get(path))[1]["status"] == "in_progress"
            await worker.end(lease, DONE)
            assert await read_events(there, 3) == await read_events(here, 3)
    whole = b"".join(PIECES) + DONE
    for router in routers:
        async with router.session.get(f"{router.url}{path}/output") as given:
            assert (given.status, given.headers["content-type"]) == (200, SSE)
            assert await given.read() == whole
        assert (await router.get(path))[1]["response"]["body"].encode() == whole
        assert [job["status"] for job in (await router.get("/v1/jobs"))[1]["data"]] == ["completed"]
    async with other.session.delete(other.url + path) as gone:
        assert (await gone.json())["deleted"]
    assert (await one.get(path))[0] == 404
    assert (await one.get("/v1/jobs"))[1]["data"] == []


async def test_a_cancelled_job_frees_its_worker_and_says_why(routers: list[RunningRouter], worker: Speaker) -> None:
    """Cancelled at the other Router while it runs: its worker is told, its state and what it said stay."""
    one, other = routers
    async with one.post(STREAM, headers=BACKGROUND) as answer:
        path = answer.headers["location"]
    lease = await worker.lease()
    await say(worker, lease, PIECES[0])
    await worker.puller.control_messages()
    async with other.session.post(f"{other.url}{path}/cancel") as answer:
        assert (await answer.json())["status"] == "cancelled"
    assert [control.kind for control in await worker.puller.control_messages()] == [ControlKind.ABORT]
    told = (await one.get(path))[1]
    assert (told["status"], told["error"]["code"]) == ("cancelled", "cancelled")
    async with one.session.get(f"{one.url}{path}/events") as answer:
        content, error = await read_events(answer, 2)
    assert content.startswith(PIECES[0].rstrip())
    assert b"cancelled on demand" in error


async def test_a_resumable_stream_is_given_up_once_nobody_follows_anywhere(
    routers: list[RunningRouter], worker: Speaker, valkey: Server
) -> None:
    """Its client leaves the one Router, comes back at the other within the grace, and leaves for good: its job ends a
    grace after that, not after the first time."""
    one, other = routers
    async with one.post(STREAM, headers=RESUMABLE) as answer:
        lease = await worker.lease()
        await say(worker, lease, *PIECES[:2])
        first = await read_events(answer, 2)
    last = {"last-event-id": id_of(first[-1])}
    assert last["last-event-id"].startswith(f"{lease.job.id}:2-")
    await asyncio.sleep(GRACE_MS / 2000)
    async with other.post(STREAM, headers=RESUMABLE | last) as answer:
        await say(worker, lease, PIECES[2])
        (third,) = await read_events(answer, 1)
        assert third.startswith(PIECES[2].rstrip())
        await asyncio.sleep((GRACE_MS + 1_200) / 1000)  # the first Router's grace is over
        await say(worker, lease, PIECES[3])
        assert (await read_events(answer, 1))[0].startswith(PIECES[3].rstrip())
    async with valkey.client(protocol=2) as redis:

        async def state() -> str:
            return (await record_of(redis, KEYS.job(lease.job.id)))["state"]

        assert await state() == "leased"

        async def given_up() -> bool:
            return await state() == "cancelled"

        await eventually(given_up, "nobody came back", limit_s=5)
    async with one.post(STREAM, headers=RESUMABLE | last) as late:
        assert (late.status, (await late.json())["error"]["code"]) == (404, "job_not_found")


async def test_a_follower_that_reads_nothing_is_cut_off(routers: list[RunningRouter], worker: Speaker) -> None:
    """Its connection, not the job: that runs on, and its output is not piled up in the Router."""
    one, _ = routers
    async with one.post(STREAM, headers=BACKGROUND) as answer:
        path = answer.headers["location"]
    lease = await worker.lease()
    large = chunk("x" * 300_000)
    await say(worker, lease, *[large] * 40)
    await worker.end(lease, DONE)
    reader, writer = await asyncio.open_connection("127.0.0.1", one.port, limit=1024)
    writer.write(b"GET %b/output HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % path.encode())
    assert b"200" in await reader.readline()
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await eventually(lambda: len(one.app.services.requests) == 0, "it is cut off", limit_s=5)
    writer.transport.abort()
    async with one.session.get(f"{one.url}{path}/output") as given:
        assert await given.read() == large * 40 + DONE
    assert 'inferq_client_disconnects_total{reason="stalled"} 1.0' in (await _metrics(one))


async def test_nothing_is_left_of_jobs_whose_time_is_over(valkey: Server, worker: Speaker) -> None:
    """After their keep time Redis holds nothing of them but counters."""
    async with running_router(valkey.url, background_retention_ms=100) as router:
        for fields in (CHAT, STREAM):
            async with router.post(fields, headers=BACKGROUND | {"idempotency-key": str(fields)}) as answer:
                job_id = JobId(answer.headers["location"].rpartition("/")[2])
            lease = await worker.lease()
            assert lease.job.id == job_id
            await worker.end(lease, DONE)
        await asyncio.sleep(0.12)
        assert (await worker.broker.maintenance.expire()).forgotten == 2
    left = [key.decode() for key in valkey.ask("KEYS", KEYS.prefix.replace("{", "[{]") + "*")]
    mine = ("out:", "idem:", "listed:", "listeners:", "persisted", "job:", "budget", "finished")
    assert [key for key in left if key.removeprefix(KEYS.prefix).startswith(mine)] == []


async def _metrics(router: RunningRouter) -> str:
    async with router.session.get(router.url + "/metrics") as answer:
        return await answer.text()
