"""The Router on a socket over a real Valkey: clients that behave, leave, stall, and send too much."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import orjson
import pytest

from queue_schemas import ControlKind, WorkerInfo
from tests.integration.router.harness import CHAT, PATH, STREAM, RunningRouter, Speaker, running_router
from tests.support.queue import MODEL
from tests.support.servers import Server
from tests.support.waiting import eventually
from tests.unit.router.fakes import worker as worker_info

DONE = b"data: [DONE]\n\n"
ODD_PATHS = [
    b"//v1/chat/completions",
    b"/v1/x/../chat/completions",
    b"/v1/chat%2fcompletions",
    b"/%76%31/chat/completions",
    b"/reset_prefix_cache",
    b"/v1/load_lora_adapter",
]


def chunk(text: str, ident: str = "one") -> bytes:
    body = {"id": ident, "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}]}
    return b"data: " + orjson.dumps(body) + b"\n\n"


@pytest.fixture
async def router(valkey: Server) -> AsyncIterator[RunningRouter]:
    async with running_router(valkey.url) as running:
        yield running


@pytest.fixture
async def worker(valkey: Server) -> AsyncIterator[Speaker]:
    async with Speaker.join(valkey.url) as speaker:
        yield speaker


async def test_a_request_goes_through_the_queue_and_back(router: RunningRouter, worker: Speaker) -> None:
    """The job carries the client's bytes; the answer comes on the same connection, again and again."""
    for n in range(3):
        asking = asyncio.ensure_future(router.plain(CHAT | {"n": n}))
        lease = await worker.lease()
        assert orjson.loads(lease.job.body)["n"] == n
        await worker.answer(lease, b"%d" % n)
        assert await asking == (200, b"%d" % n)


async def test_a_stream_is_passed_on_as_it_is_made(router: RunningRouter, worker: Speaker) -> None:
    """Each piece reaches the client before the next one exists; the end closes the answer, not the connection."""

    async def speak() -> None:
        lease = await worker.lease()
        await worker.say(lease, chunk("a"))
        await heard.wait()
        await worker.end(lease, chunk("b") + DONE)

    heard = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(speak())
        async with router.post(STREAM) as answer:
            assert answer.headers["cache-control"] == "no-cache"
            assert await answer.content.readuntil(b"\n\n") == chunk("a")
            heard.set()
            assert await answer.read() == chunk("b") + DONE


async def test_a_client_that_leaves_aborts_its_running_job(router: RunningRouter, worker: Speaker) -> None:
    """The worker is told to abort within moments, and nothing of the request stays."""
    asking = asyncio.ensure_future(router.plain())
    lease = await worker.lease()
    asking.cancel()

    async def aborted() -> bool:
        told = await worker.puller.control_messages(20)
        return any(control.kind is ControlKind.ABORT and control.job_id == lease.job.id for control in told)

    await eventually(aborted, "the worker is told to abort")
    await eventually(lambda: not len(router.app.services.requests), "the request is over")


async def test_a_client_that_leaves_removes_its_waiting_job(
    router: RunningRouter, worker: Speaker, valkey: Server
) -> None:
    """A job nobody has begun is removed unrun."""
    asking = asyncio.ensure_future(router.plain())

    async def waiting() -> int:
        depths = await worker.broker.stats.depths()
        return sum(depth.waiting for lanes in depths.values() for depth in lanes.values())

    await eventually(waiting, "the job waits")
    asking.cancel()

    async def none_waits() -> bool:
        return not await waiting()

    await eventually(none_waits, "the job is gone")
    assert await worker.puller.claim(1) == []


async def test_a_silent_stream_gets_comments_on_the_wire(valkey: Server, worker: Speaker) -> None:
    """Before any worker answers, the client already has a 200 and comments, which say that none is registered."""
    waiting = f": waiting for a worker that serves {MODEL}\n".encode()
    async with running_router(valkey.url, keepalive_interval_ms=60) as router, router.post(STREAM) as answer:
        assert answer.status == 200
        assert await answer.content.readuntil(b"\n") == waiting
        lease = await worker.lease()
        await worker.end(lease, chunk("a") + DONE)
        assert (await answer.read()).replace(waiting, b"") == chunk("a") + DONE


async def test_a_lost_worker_does_not_show_in_the_stream(
    router: RunningRouter, worker: Speaker, valkey: Server
) -> None:
    """After a reclaim the next attempt goes on where the first stopped; leftovers of the first are dropped."""

    async def speak() -> None:
        lost = await worker.lease()
        await worker.say(lost, chunk("The capi"))
        await worker.broker.maintenance.reclaim(worker.puller.session_id)
        await worker.say(lost, chunk("WRONG"))
        async with Speaker.join(valkey.url) as other:
            lease = await other.lease()
            assert lease.job.id == lost.job.id
            await other.say(lease, chunk("The capital", "two"))
            await worker.say(lost, chunk("WRONG"))
            await other.end(lease, chunk(" is Paris", "two") + DONE)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(speak())
        async with router.post(STREAM) as answer:
            body = await answer.read()
    assert body == chunk("The capi") + chunk("tal") + chunk(" is Paris") + DONE


async def test_a_body_of_100_mb_is_refused(router: RunningRouter) -> None:
    """Announced or not, the client can read the refusal, and memory does not hold the body."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * (1 << 20)

    for data in (b"x" * (100 << 20), pieces()):
        async with router.session.post(router.url + PATH, data=data) as answer:
            assert answer.status == 413
            assert (await answer.json())["error"]["code"] == "request_too_large"
    await eventually(lambda: not len(router.app.services.requests), "the refused requests are over")


async def test_a_body_that_creeps_is_given_up(valkey: Server) -> None:
    """A connection that sends a byte now and then does not hold its place for ever."""
    async with running_router(valkey.url, body_idle_timeout_ms=150) as router:
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n{")
        async with asyncio.timeout(5):
            assert (await reader.readline()).startswith(b"HTTP/1.1 408")
            await reader.read()
        writer.close()


async def test_a_slow_reader_is_cut_off(valkey: Server, worker: Speaker) -> None:
    """A client that stops reading a long stream is disconnected and its job aborted; others go on."""
    async with running_router(valkey.url, max_client_buffer_bytes=64 * 1024) as router:
        body = orjson.dumps(STREAM)
        # A small window, set before connecting: what piles up does so in the router, not in the kernel.
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port, limit=1024)
        writer.write(
            b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%b" % (PATH.encode(), len(body), body)
        )
        lease = await worker.lease()
        writer.transport.pause_reading()  # type: ignore[attr-defined]

        async def aborted() -> bool:
            await worker.say(lease, chunk("x" * 200_000))
            told = await worker.puller.control_messages(1)
            return any(control.kind is ControlKind.ABORT for control in told)

        await eventually(aborted, "the job of the slow reader is aborted", limit_s=20)
        writer.transport.abort()
        other = asyncio.ensure_future(router.plain())
        await worker.answer(await worker.lease())
        assert (await other)[0] == 200
        del reader


@pytest.mark.parametrize("path", ODD_PATHS)
async def test_odd_spellings_on_the_wire_reach_no_engine(router: RunningRouter, worker: Speaker, path: bytes) -> None:
    """What the server makes of a raw path never becomes an engine's path."""
    reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
    body = orjson.dumps(CHAT)
    writer.write(b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%b" % (path, len(body), body))
    async with asyncio.timeout(5):
        assert b" 404 " in await reader.readline()
    writer.close()
    assert await worker.puller.claim(1) == []


async def test_models_follow_the_fleet(router: RunningRouter, worker: Speaker) -> None:
    """A model that joins can be asked for at once, and is listed."""
    info: WorkerInfo = worker_info("fresh")
    await worker.broker.fleet.save_workers([info], [])
    asking = asyncio.ensure_future(router.plain({"model": "fresh"}))
    leases = await eventually(lambda: worker.puller.claim(1, ["fresh"]), "the job is there")
    await worker.answer(leases[0])
    assert (await asking)[0] == 200
    _status, models = await router.get("/v1/models")
    assert {model["id"] for model in models["data"]} == {"fresh", MODEL}


async def test_pipelined_requests_are_answered_in_order(router: RunningRouter, worker: Speaker) -> None:
    """Two requests in one packet get two answers on the same connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
    for n in (1, 2):
        body = orjson.dumps(CHAT | {"n": n})
        writer.write(
            b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%b" % (PATH.encode(), len(body), body)
        )
    async with asyncio.timeout(10):
        for n in (1, 2):
            lease = await worker.lease()
            assert orjson.loads(lease.job.body)["n"] == n
            await worker.answer(lease, b"answer%d" % n)
            await reader.readuntil(b"answer%d" % n)
    writer.close()


async def test_redis_killed_and_back_loses_no_request(own_valkey: Server) -> None:
    """Requests that wait, and requests that come, while Redis restarts are answered; readiness says what happens."""
    async with running_router(own_valkey.url) as router, Speaker.join(own_valkey.url) as worker:
        waiting = asyncio.ensure_future(router.plain(CHAT | {"n": 1}))
        lease = await worker.lease()
        await asyncio.sleep(1.2)  # appendfsync everysec: what is older is on disk
        own_valkey.kill()
        await eventually(router.app.services.not_ready_reasons, "not ready")
        assert (await router.get("/readyz"))[0] == 503
        coming = asyncio.ensure_future(router.plain(CHAT | {"n": 2}))
        own_valkey.start()
        await worker.answer(lease, b"one")
        assert await waiting == (200, b"one")
        await worker.answer(await worker.lease(), b"two")
        assert await coming == (200, b"two")
        await eventually(lambda: not router.app.services.not_ready_reasons(), "ready again")


async def test_a_redis_that_forgot_everything_is_filled_again(own_valkey: Server) -> None:
    """Jobs that were lost with Redis's data are put back by the Router that still waits for them."""
    async with running_router(own_valkey.url) as router, Speaker.join(own_valkey.url) as worker:
        waiting = asyncio.ensure_future(router.plain())
        await worker.lease()
        own_valkey.ask("FLUSHALL")
        async with Speaker.join(own_valkey.url) as fresh:
            lease = await eventually(lambda: fresh.puller.claim(1), "the job is back", limit_s=25)
            await fresh.answer(lease[0], b"late but right")
        assert await waiting == (200, b"late but right")


async def test_redis_that_comes_late_is_found(own_valkey: Server) -> None:
    """A Router started before Redis answers 503 with the reason, and serves once Redis is there."""
    own_valkey.kill()
    async with running_router(own_valkey.url, ready=False) as router:
        status, body = await router.plain()
        assert status == 503
        assert orjson.loads(body)["error"]["code"] == "broker_unavailable"
        status, page = await router.get("/readyz")
        assert status == 503
        assert "Redis" in page["reasons"][0]
        own_valkey.start()
        await eventually(lambda: not router.app.services.not_ready_reasons(), "ready")
        async with Speaker.join(own_valkey.url) as worker:
            asking = asyncio.ensure_future(router.plain())
            await worker.answer(await worker.lease())
            assert (await asking)[0] == 200


async def test_redis_gone_for_good_ends_requests_at_their_deadline(own_valkey: Server) -> None:
    """No client hangs: without Redis a request ends a grace after its deadline."""
    async with running_router(own_valkey.url, deadline_grace_ms=100) as router:
        asking = asyncio.ensure_future(router.plain(headers={"x-inferq-deadline-ms": "900"}))
        await eventually(lambda: router.app.services.requests.waiting, "the job is queued")
        own_valkey.kill()
        status, _body = await asyncio.wait_for(asking, 5)
        assert status == 504
        late = await asyncio.wait_for(router.plain(headers={"x-inferq-deadline-ms": "300"}), 5)
        assert late[0] == 504


async def test_a_hundred_clients_at_once_are_not_mixed_up(router: RunningRouter, worker: Speaker) -> None:
    """Plain and streamed requests side by side each get their own answer."""

    async def serve() -> None:
        served = 0
        while served < 100:
            leases = await worker.puller.claim(16)
            if not leases:
                await worker.puller.control_messages(50)
            for lease in leases:
                n = b"%d" % orjson.loads(lease.job.body)["n"]
                if lease.job.stream:
                    await worker.say(lease, b"data: " + n + b"\n\n")
                    await worker.end(lease, DONE)
                else:
                    await worker.answer(lease, n)
                served += 1

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(serve())
        asking = [tasks.create_task(router.plain(CHAT | {"n": n, "stream": n % 2 == 0})) for n in range(100)]
    for n, task in enumerate(asking):
        expected = b"data: %d\n\n" % n + DONE if n % 2 == 0 else b"%d" % n
        assert task.result() == (200, expected)


async def test_a_shutdown_finishes_what_runs(valkey: Server, worker: Speaker) -> None:
    """An open request gets its answer during the drain, and a stream that takes too long an error event."""
    async with running_router(valkey.url, shutdown_timeout_ms=400) as router:
        plain = asyncio.ensure_future(router.plain())
        lease = await worker.lease()
        streaming = asyncio.ensure_future(router.plain(STREAM))
        await worker.say(await worker.lease(), chunk("a"))
        draining = asyncio.ensure_future(router.app.drain())
        await worker.answer(lease)
        assert (await plain)[0] == 200
        assert (await router.plain())[0] == 503
        await draining
        status, body = await streaming
        assert status == 200
        assert body.startswith(chunk("a"))
        assert b'"shutting_down"' in body
