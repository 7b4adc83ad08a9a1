"""What happens when something dies: workers, Redis, the Manager, the one who waits."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from queue_schemas import END, MarkerKind
from telemetry.environment import free_port
from tests.support.servers import Server
from tests.support.waiting import eventually

from .fleet import LEASE_MS, Answer, Client, Fleet, fleet_on


@pytest.fixture
async def fleet_and_client(own_valkey: Server, tmp_path: Path) -> AsyncIterator[tuple[Fleet, Client]]:
    async with fleet_on(own_valkey, tmp_path) as both:
        yield both


@pytest.fixture
def fleet(fleet_and_client: tuple[Fleet, Client]) -> Fleet:
    return fleet_and_client[0]


@pytest.fixture
def client(fleet_and_client: tuple[Fleet, Client]) -> Client:
    return fleet_and_client[1]


def complete(answer: Answer) -> bool:
    return answer.status == 200 and answer.body.endswith((b"data: [DONE]\n\n", b"}"))


async def test_jobs_of_a_killed_worker_run_elsewhere(fleet: Fleet, client: Client) -> None:
    """SIGKILL with running jobs, plain and streamed: all are answered in full by the other worker."""
    victim = await fleet.worker("w1").until_ready()
    jobs = [await client.send(stream=bool(i % 2), max_tokens=100) for i in range(6)]
    await client.begun(jobs[5])
    victim.process.kill()
    await fleet.worker("w2").until_ready()
    answers = [await client.answer(job, 30) for job in jobs]
    assert all(complete(answer) for answer in answers)
    assert all(answer.markers for answer in answers)
    await client.until_nothing_is_left()


async def test_sigterm_drains(fleet: Fleet, client: Client) -> None:
    """Running jobs finish on the worker that has them, new ones go to others, the process ends with 0."""
    worker = await fleet.worker("w1").until_ready()
    running = await client.send(stream=True, max_tokens=60)
    await client.begun(running)
    worker.process.send(signal.SIGTERM)
    await eventually(lambda: (worker.status() or {"draining": True})["draining"], "it drains")
    later = await client.send()
    answer = await client.answer(running)
    assert complete(answer)
    assert not answer.markers
    assert await worker.ended() == 0
    assert not client.answers[later].frames
    await fleet.worker("w2").until_ready()
    assert complete(await client.answer(later))


async def test_a_drain_has_an_end_after_which_jobs_are_handed_back_uncounted(fleet: Fleet, client: Client) -> None:
    """What does not finish within the limit runs elsewhere, as if never started: one attempt is enough for it."""
    worker = await fleet.worker("w1", "--drain-timeout-ms", "300", "--sim-tokens-per-s", "5").until_ready()
    job = await client.send(stream=True, max_tokens=40, max_attempts=1)
    await client.begun(job)
    assert worker.post("/drain") == 202
    assert await worker.ended() == 0
    await fleet.worker("w2").until_ready()
    answer = await client.answer(job)
    assert complete(answer)
    assert [marker.kind for marker in answer.markers] == [MarkerKind.REQUEUED]


async def test_a_second_signal_hands_over_at_once_and_uncounted(fleet: Fleet, client: Client) -> None:
    """[G4] Who does not want to wait for the drain says it again: what runs goes to others as if never started, so that
    a single attempt is enough for it, and the worker ends in good order."""
    worker = await fleet.worker("w1", "--engine", "sim-process", "--sim-tokens-per-s", "5").until_ready()
    jobs = [await client.send(stream=stream, max_tokens=100, max_attempts=1) for stream in (True, True, False)]
    await client.begun(jobs[0])
    await client.begun(jobs[1])
    await eventually(lambda: (worker.status() or {"running": 0})["running"] == 3, "all run")
    worker.process.send(signal.SIGTERM)
    await eventually(lambda: (worker.status() or {"draining": True})["draining"], "it drains")
    worker.process.send(signal.SIGINT)
    assert await worker.ended(10) == 0
    await fleet.worker("w2").until_ready()
    for answer in [await client.answer(job) for job in jobs]:
        assert complete(answer)
        assert {marker.kind for marker in answer.markers} == {MarkerKind.REQUEUED}
    await client.until_nothing_is_left()


async def test_redis_killed_and_back_loses_nothing(fleet: Fleet, client: Client) -> None:
    """kill -9 of Redis while jobs run: workers keep them, frames and answers arrive when it is back."""
    worker = await fleet.worker("w1").until_ready()
    jobs = [await client.send(stream=bool(i % 2), max_tokens=150) for i in range(6)]
    for job in jobs[1::2]:
        await client.begun(job)
    # What everysec has not written yet may be lost; this test is about what it has.
    await eventually(lambda: b"aof_pending_bio_fsync:0" in _info(fleet), "the queue is on disk")
    await asyncio.sleep(1.1)
    await asyncio.to_thread(fleet.server.kill)
    await eventually(lambda: not worker.status()["broker_ok"], "the worker notices")
    await asyncio.to_thread(fleet.server.start)
    answers = [await client.answer(job, 30) for job in jobs]
    assert all(complete(answer) for answer in answers)
    assert worker.process.running
    await client.until_nothing_is_left()


def _info(fleet: Fleet) -> bytes:
    info: dict[str, object] = fleet.server.ask("INFO", "persistence")
    return "\n".join(f"{name}:{value}" for name, value in info.items()).encode()


async def test_a_worker_started_before_redis_waits_for_it(fleet: Fleet, client: Client, tmp_path: Path) -> None:
    """Started with the address of a Redis that is not there yet, it registers, says why it is not ready, and waits."""
    late = Server(fleet.server.binary, tmp_path / "late", port=free_port())
    worker = fleet.worker("w1", "--redis-url", late.url)
    await eventually(
        lambda: any("Redis" in reason for reason in (worker.status() or {"reasons": []})["reasons"]),
        "it says that Redis is missing",
        limit_s=20,
    )
    await asyncio.to_thread(late.start)
    try:
        await worker.until_ready()
    finally:
        late.stop()


async def test_serving_goes_on_without_a_manager(fleet: Fleet, client: Client) -> None:
    """With the Manager gone jobs are pulled, answered and stopped in time; when back the worker is known again."""
    worker = await fleet.worker("w1").until_ready()
    fleet.manager.kill()
    await eventually(lambda: any("does not answer" in why for why in worker.status()["reasons"]), "it notices")
    for stream in (False, True):
        assert complete(await client.ask(stream=stream))
    assert (await client.ask(max_tokens=5_000, ttl_ms=600)).status == 504
    session_id = worker.status()["session_id"]
    await fleet.start_manager()
    await worker.until_ready()
    assert worker.status()["session_id"] == session_id
    assert complete(await client.ask())


async def test_without_a_manager_workers_reclaim_each_others_jobs(fleet: Fleet, client: Client) -> None:
    """Every Manager is killed, then a worker: its jobs run on the other one a lease later, and what nobody serves still
    expires in time."""
    victim = await fleet.worker("w1").until_ready()
    jobs = [await client.send(stream=bool(i % 2), max_tokens=200) for i in range(4)]
    await client.begun(jobs[3])
    other = await fleet.worker("w2").until_ready()
    fleet.manager.kill()
    victim.process.kill()
    unserved = await client.send(model="nobody-serves-it", ttl_ms=500)
    answers = [await client.answer(job, 60) for job in jobs]
    assert all(complete(answer) for answer in answers)
    assert all(answer.markers for answer in answers)
    assert "fallback_sweep_started" in other.process.log_text()
    assert "inferq_fallback_reclaimed_jobs_total 4.0" in other.metrics()
    assert [marker.kind for marker in (await client.answer(unserved)).markers] == [MarkerKind.EXPIRED]
    await client.until_nothing_is_left()
    await fleet.start_manager()
    await eventually(lambda: "fallback_sweep_ended" in other.process.log_text(), "it leaves the work to the Manager")


async def test_it_goes_on_with_the_next_manager_url(fleet: Fleet, client: Client) -> None:
    """A URL where nobody answers is passed over; running jobs are kept when the one in use goes away."""
    dead = f"http://127.0.0.1:{free_port()}"
    worker = await fleet.worker("w1", "--manager-url", dead).until_ready()
    assert complete(await client.ask())
    assert worker.status()["manager_url"] == fleet.manager_url


async def test_a_second_worker_of_the_same_id_is_refused(fleet: Fleet, client: Client) -> None:
    """It tries for a few seconds, then ends with a sentence that says what to do; the first is not disturbed."""
    first = await fleet.worker("w1").until_ready()
    second = fleet.worker("w1")
    assert await second.ended(20) == 2
    assert "another worker called w1 is alive" in second.process.log_text()
    assert "--worker-id" in second.process.log_text()
    assert complete(await client.ask())
    assert first.process.running


async def test_a_worker_that_was_killed_may_come_back_under_its_id_at_once(fleet: Fleet, client: Client) -> None:
    """Its predecessor is certainly dead: its jobs are taken back and the successor serves them."""
    first = await fleet.worker("w1").until_ready()
    job = await client.send(stream=True, max_tokens=60)
    await client.begun(job)
    first.process.kill()
    await fleet.worker("w1").until_ready()
    assert complete(await client.answer(job))


async def test_a_fenced_worker_drops_its_jobs_and_starts_a_new_session(fleet: Fleet, client: Client) -> None:
    """Paused for longer than its lease, it finds itself fenced: its late answers are dropped, it joins as another."""
    paused = await fleet.worker("w1").until_ready()
    before = paused.status()["session_id"]
    job = await client.send(stream=True, max_tokens=400)
    await client.begun(job)
    paused.process.pause()
    assert not client.answers[job].ended
    await fleet.worker("w2").until_ready()
    answer = client.answers[job]
    await eventually(lambda: answer.markers, "the job is taken back", limit_s=LEASE_MS / 1_000 + 30)
    paused.process.resume()
    await eventually(lambda: (paused.status() or {}).get("session_id") not in (None, before), "a new session_id")
    assert complete(await client.answer(job, 40))
    assert answer.frames[0].epoch == answer.markers[-1].epoch
    await paused.until_ready()
    assert "inferq_sessions_fenced_total 1.0" in paused.metrics()


async def test_a_router_that_vanished_frees_the_slot(fleet: Fleet, client: Client) -> None:
    """Nobody reads the answer any more: the engine call is closed and the job ends, instead of running to its end."""
    worker = await fleet.worker("w1", "--slots", "1").until_ready()
    gone = Client(client.broker)
    reading = asyncio.create_task(client.broker.replies.read(gone.session_id, gone.deliver))
    await eventually(lambda: fleet.server.ask("EXISTS", f"iq:{{0}}:reply:{gone.session_id}"), "its stream exists")
    job = await gone.send(stream=True, max_tokens=5_000)
    await gone.begun(job)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    fleet.server.ask("DEL", f"iq:{{0}}:reply:{gone.session_id}")
    await eventually(lambda: worker.status()["running"] == 0, "the slot is free", limit_s=5)
    await client.until_nothing_is_left()


async def test_a_hung_engine_loses_its_jobs_to_another_worker(fleet: Fleet, client: Client) -> None:
    """An engine that answers health checks but produces nothing: after the stall limit its jobs run elsewhere."""
    await fleet.worker("w1", "--engine-stall-timeout-ms", "1000").until_ready()
    job = await client.send(stream=True, order={"fail": "hang", "after_tokens": 3, "on": "w1"})
    await client.begun(job)
    await fleet.worker("w2").until_ready()
    assert complete(await client.answer(job, 30))


async def test_a_stream_that_its_engine_forgot_is_stopped_alone(fleet: Fleet, client: Client) -> None:
    """[C5] Streams stand still on one worker while others there go on: they run again elsewhere, the others stay."""
    workers = [await fleet.worker(name, "--stream-idle-timeout-ms", "1000").until_ready() for name in ("w1", "w2")]
    await client.until_listed("w1", "w2")
    neighbours = [await client.send(stream=True, max_tokens=200) for _ in range(6)]
    for neighbour in neighbours:
        await client.begun(neighbour)
    hang = {"fail": "hang", "after_tokens": 3, "on": "w1"}
    stuck = [await client.send(stream=True, order=hang) for _ in range(6)]
    answers = [await client.answer(job, 30) for job in stuck]
    assert all(map(complete, answers))
    moved = [answer for answer in answers if answer.markers]
    assert moved, "none of them ran where streams are forgotten"
    assert all([marker.kind for marker in answer.markers] == [MarkerKind.REQUEUED] for answer in moved)
    beside = [await client.answer(neighbour, 30) for neighbour in neighbours]
    assert all(map(complete, beside))
    assert not any(answer.markers for answer in beside)
    assert "stream_stalled" in workers[0].process.log_text()
    assert "inferq_sessions_fenced_total 0.0" in workers[0].metrics()


async def test_a_stream_that_its_only_engine_forgot_ends_with_an_error(fleet: Fleet, client: Client) -> None:
    """[C5] The same engine would do the same again: the client is told, once, and by which limit."""
    await fleet.worker("w1", "--stream-idle-timeout-ms", "1000").until_ready()
    neighbour = await client.send(stream=True, max_tokens=200)
    await client.begun(neighbour)
    answer = await client.ask(stream=True, order={"fail": "hang", "after_tokens": 3})
    assert answer.frames[-1].flags & END
    assert b"INFERQ_WORKER_STREAM_IDLE_TIMEOUT_MS" in answer.body
    assert not answer.markers
    assert complete(await client.answer(neighbour, 30))


async def test_an_unreachable_engine_is_reported_and_its_jobs_wait(fleet: Fleet, client: Client) -> None:
    """With the attached engine away the worker lives, says so, and claims nothing."""
    port = free_port()
    worker = fleet.worker("w1", "--engine-url", f"http://127.0.0.1:{port}/v1", engine=False)
    await eventually(
        lambda: any("cannot be reached" in why for why in (worker.status() or {"reasons": []})["reasons"]),
        "it says that the engine is away",
        limit_s=20,
    )
    assert worker.process.running
    assert worker.process.terminate() == 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((), "say what to serve"),
        (("--engine-url", "localhost:8000"), "--engine-url must be"),
        (("--model", "m", "--vllm-command", "/nowhere/vllm"), "there is no executable"),
        (("--engine", "sim", "--host", "0.0.0.0"), "join token"),  # noqa: S104 - it is refused
        (("--engine", "sim", "--slots", "0"), "slots"),
    ],
)
async def test_a_start_that_cannot_work_ends_with_a_sentence(
    fleet: Fleet, flags: tuple[str, ...], sentence: str
) -> None:
    """Wrong settings end the process with code 2 and one line that says what to correct."""
    worker = fleet.worker("w1", *flags, engine=False)
    assert await worker.ended(20) == 2
    assert sentence in worker.process.log_text()
    assert "Traceback" not in worker.process.log_text()
