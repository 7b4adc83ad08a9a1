"""Jobs through a real queue, Manager, worker and simulated engine."""

from __future__ import annotations

import asyncio
import json

import pytest

from broker.operations.replies import extend_reply_stream
from queue_schemas import MarkerKind
from queue_schemas.keys import ShardKeys
from tests.support.servers import Server
from tests.support.waiting import eventually

from .fleet import Client, LocalFleet
from .test_attached_engines import attached


async def test_plain_and_streamed_chats_are_answered(fleet: LocalFleet, client: Client) -> None:
    """A job goes in, the engine's answer comes out: whole, or as events ending with [DONE]."""
    await fleet.worker("w1").until_ready()
    plain = await client.ask()
    assert plain.status == 200
    text = json.loads(plain.body)["choices"][0]["message"]["content"]
    streamed = await client.ask(stream=True)
    events = [line[6:] for line in streamed.body.decode().split("\n") if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events) == text
    assert len(streamed.frames) > 2
    await client.until_nothing_is_left()


async def test_a_job_wakes_an_idle_worker_at_once(fleet: LocalFleet, client: Client) -> None:
    """A parked worker answers in a fraction of a second, not at the next poll."""
    worker = await fleet.worker("w1").until_ready()
    await client.ask(max_tokens=1)
    begin = asyncio.get_running_loop().time()
    for _ in range(5):
        await client.ask(max_tokens=1)
    assert (asyncio.get_running_loop().time() - begin) / 5 < 0.5
    assert not worker.task.done()


async def test_no_more_jobs_run_than_there_are_slots(fleet: LocalFleet, client: Client) -> None:
    """The queue, not the engine, is where requests wait."""
    worker = await fleet.worker("w1", "--slots", "2").until_ready()
    jobs = [await client.send(max_tokens=25) for _ in range(6)]
    most = 0
    while not all(client.answers[job].ended for job in jobs):
        most = max(most, worker.running)
        await asyncio.sleep(0.02)
    assert most == 2
    assert [client.answers[job].status for job in jobs] == [200] * 6


async def test_jobs_wait_for_a_worker_that_is_not_there_yet(fleet: LocalFleet, client: Client) -> None:
    """A job enqueued before any worker exists is answered when one comes."""
    job = await client.send()
    await fleet.worker("w1").until_ready()
    assert (await client.answer(job)).status == 200


async def test_a_client_error_of_the_engine_is_passed_on(fleet: LocalFleet, client: Client) -> None:
    """The engine's 4xx reaches the client as it is, after one attempt."""
    await fleet.worker("w1").until_ready()
    answer = await client.ask(order={"fail": "422"})
    assert answer.status == 422
    assert not answer.markers


async def test_an_engine_error_is_retried_elsewhere(fleet: LocalFleet, client: Client) -> None:
    """A 5xx of one engine is answered by another."""
    await fleet.worker("w1").until_ready()
    await fleet.worker("w2").until_ready()
    await client.until_listed("w1", "w2")
    for stream in (False, True):
        jobs = [await client.send(stream=stream, order={"fail": "500", "on": "w1"}) for _ in range(6)]
        answers = [await client.answer(job) for job in jobs]
        assert [answer.status for answer in answers] == [200] * 6
        assert any(answer.markers for answer in answers)


async def test_an_engine_error_everywhere_ends_with_the_engines_own_answer(fleet: LocalFleet, client: Client) -> None:
    """After the last attempt the client sees what the engine said."""
    await fleet.worker("w1").until_ready()
    await fleet.worker("w2").until_ready()
    await client.until_listed("w1", "w2")
    answer = await client.ask(order={"fail": "503"}, max_attempts=2)
    assert answer.status == 503
    assert [marker.kind for marker in answer.markers] == [MarkerKind.REQUEUED]


async def test_a_stream_that_breaks_runs_again(fleet: LocalFleet, client: Client) -> None:
    """The engine drops the connection after three tokens, once: the job is answered in full by its next attempt."""
    await fleet.worker("w1").until_ready()
    answer = await client.ask(stream=True, order={"fail": "close_midstream", "after_tokens": 3, "times": 1})
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert [marker.kind for marker in answer.markers] == [MarkerKind.REQUEUED]


async def test_a_job_that_breaks_every_engine_is_buried(fleet: LocalFleet, client: Client) -> None:
    """Attempts are bounded: the job becomes a dead letter, its neighbour is answered."""
    await fleet.worker("w1").until_ready()
    broken = await client.send(stream=True, order={"fail": "close_midstream", "after_tokens": 1}, max_attempts=2)
    assert (await client.ask()).status == 200
    answer = await client.answer(broken)
    assert [marker.kind for marker in answer.markers] == [MarkerKind.REQUEUED, MarkerKind.DEAD]
    await client.until_nothing_is_left()


async def test_a_crash_of_the_engine_process_costs_an_attempt_not_an_answer(fleet: LocalFleet, client: Client) -> None:
    """A job ends the engine's process: it is declared dead, the engine is started again, and its neighbour is
    answered."""
    worker = await fleet.worker("w1", "--engine", "sim-process").until_ready()
    bystander = await client.send(max_tokens=100)
    await eventually(lambda: worker.running == 1, "the bystander runs")
    crash = await client.ask(stream=True, order={"fail": "crash", "after_tokens": 2}, max_attempts=1)
    assert [marker.kind for marker in crash.markers] == [MarkerKind.DEAD]
    assert (await client.answer(bystander)).status == 200
    assert [marker.kind for marker in client.answers[bystander].markers] == [MarkerKind.REQUEUED]
    assert not worker.task.done()


async def test_a_cancelled_job_frees_its_slot(fleet: LocalFleet, client: Client) -> None:
    """Cancelling closes the engine call at once: the only slot takes the next job."""
    worker = await fleet.worker("w1", "--slots", "1").until_ready()
    job = await client.send(stream=True, max_tokens=5_000)
    await client.begun(job)
    await client.broker.jobs.cancel(job, "the client went away")
    await eventually(lambda: worker.running == 0, "the slot is free", limit_s=3)
    assert (await client.ask()).status == 200
    assert client.answers[job].markers[-1].kind is MarkerKind.CANCELLED


async def test_a_job_past_its_deadline_is_stopped(fleet: LocalFleet, client: Client) -> None:
    """A running job whose time runs out ends with an error, and its slot is free."""
    worker = await fleet.worker("w1", "--slots", "1").until_ready()
    answer = await client.ask(max_tokens=5_000, ttl_ms=600)
    assert (answer.frames and answer.status == 504) or answer.markers[-1].kind is MarkerKind.EXPIRED
    await eventually(lambda: worker.running == 0, "the slot is free", limit_s=3)


async def test_metrics_and_pages_say_what_happened(fleet: LocalFleet, client: Client) -> None:
    """Attempts, tokens, waits, slots and round trips are counted; the health page says who answers."""
    worker = await fleet.worker("w1").until_ready()
    await client.ask(max_tokens=8)
    for line in (
        'inferq_attempts_total{model="sim",outcome="done"} 1.0',
        'inferq_tokens_total{kind="completion",model="sim"} 8.0',
        'inferq_queue_wait_seconds_count{lane="interactive",model="sim"} 1.0',
        'inferq_settled_total{answer="ok"} 1.0',
        'inferq_slots{state="total"} 32.0',
        'inferq_redis_round_trips_total{role="worker"}',
    ):
        # The client has its answer a moment before the worker hears that it was taken.
        await eventually(lambda line=line: line in worker.metrics(), line)
    assert worker.worker.status().session_id.startswith("w1.")


async def test_a_router_that_does_not_read_slows_its_own_stream_alone(
    fleet: LocalFleet, client: Client, valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reply stream stays within its bound and the engine is not read, while the worker serves others. Once the
    Router reads, it gets the whole answer, in order."""
    limit, event, count = 8 << 20, b'data: {"choices":[{"index":0,"delta":{"content":"%08d"}}]}' + b" " * 16_000, 1_500
    monkeypatch.setenv("INFERQ_BROKER_MAX_REPLY_BYTES", str(limit))
    written = 0

    async def answer(number: int, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        for piece in range(count if number == 1 else 3):
            writer.write(event % piece + b"\n\n")
            await writer.drain()
            written = max(written, piece)
        writer.write(b"data: [DONE]\n\n")
        await writer.drain()
        writer.close()

    keys, stuck = ShardKeys(0), Client(client.broker)
    await extend_reply_stream(client.broker._caller, keys, stuck.session_id, 60_000)
    async with attached(fleet, client, answer):
        job = await stuck.send(model="open", stream=True)
        redis = valkey.client(protocol=2)

        async def held() -> bool:
            before = written
            await asyncio.sleep(0.3)
            return before == written > 0

        await eventually(held, "the engine is read no more", limit_s=30)
        assert 0.8 * limit < await redis.memory_usage(keys.reply(stuck.session_id), samples=0) < 1.2 * limit
        for _ in range(3):
            assert (await client.ask(model="open", stream=True)).status == 200
        assert written < count - 1
        reading = asyncio.create_task(client.broker.replies.read(stuck.session_id, stuck.deliver))
        whole = await stuck.answer(job, limit_s=30)
        assert not whole.markers
        assert whole.body == b"".join(event % piece + b"\n\n" for piece in range(count)) + b"data: [DONE]\n\n"
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await redis.aclose()
        await client.until_nothing_is_left()
