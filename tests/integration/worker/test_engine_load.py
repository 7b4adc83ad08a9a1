"""Slots that follow the load of a real engine process, and engines whose metrics say nothing, or nonsense."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from statistics import mean

import pytest

from tests.support.waiting import eventually
from worker.engines import http

from .fleet import Client, LocalFleet, LocalWorker
from .test_attached_engines import MODELS, whole

OFTEN = ("--engine-load-interval-ms", "100")
LOAD = b"vllm:num_requests_waiting %d\nvllm:num_requests_running %d\nvllm:kv_cache_usage_perc 0.5\n"


def figure(worker: LocalWorker, name: str) -> float:
    """A sample of the worker's metrics page."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", worker.metrics(), re.MULTILINE)
    assert found, name
    return float(found[1])


async def test_an_engines_own_queue_drains_and_it_stays_full(fleet: LocalFleet, client: Client) -> None:
    """64 slots on an engine that runs 16: the other 48 jobs go back to waiting where lanes and deadlines count."""
    options = ("--engine", "sim-process", "--slots", "64", "--sim-max-num-seqs", "16", *OFTEN)
    worker = await fleet.worker("w1", *options).until_ready()
    jobs = [await client.send(max_tokens=25) for _ in range(400)]
    await eventually(lambda: figure(worker, 'inferq_engine_requests{state="waiting"}') >= 8, "requests wait inside")
    await eventually(lambda: worker.worker.status().slots <= 18, "the slots follow", limit_s=20)
    await eventually(lambda: worker.running <= 18, "the engine's queue drains", limit_s=20)
    samples: list[tuple[float, float]] = []
    for _ in range(20):
        await asyncio.sleep(0.1)
        waiting, running = (
            figure(worker, f'inferq_engine_requests{{state="{state}"}}') for state in ("waiting", "running")
        )
        samples.append((waiting, running))
    assert mean(waiting for waiting, _ in samples) <= 2
    assert mean(running for _, running in samples) >= 14
    assert 14 <= figure(worker, 'inferq_slots{state="total"}') <= 20

    async def told() -> bool:
        return (await client.broker.fleet.load_workers())["w1"].slots <= 20

    await eventually(told, "heartbeats say the slots")
    for job in jobs:
        assert (await client.answer(job, limit_s=60)).status == 200
    await client.until_nothing_is_left()


async def test_slots_grow_to_an_engine_with_room(fleet: LocalFleet, client: Client) -> None:
    """Two slots, up to 64, on an engine that runs 12: it is kept full, and its queue near empty."""
    options = ("--engine", "sim-process", "--slots", "2", "--max-slots", "64", "--sim-max-num-seqs", "12", *OFTEN)
    worker = await fleet.worker("w1", *options).until_ready()
    jobs = [await client.send(max_tokens=25) for _ in range(200)]
    await eventually(lambda: figure(worker, 'inferq_engine_requests{state="running"}') >= 11, "it is full", limit_s=20)
    assert worker.worker.status().slots <= 16
    for job in jobs:
        assert (await client.answer(job, limit_s=60)).status == 200


async def test_a_full_kv_cache_lowers_the_slots(fleet: LocalFleet, client: Client) -> None:
    """Where memory is the bound, requests stop to push each other out, and none fails or says anything else."""
    options = ("--sim-kv-cache-tokens", "320", "--sim-max-model-len", "320", "--sim-block-tokens", "4")
    worker = await fleet.worker("w1", "--slots", "32", *options, *OFTEN).until_ready()
    alone = await client.ask(max_tokens=40)
    jobs = [await client.send(max_tokens=40) for _ in range(150)]
    await eventually(lambda: figure(worker, "inferq_engine_preemptions") > 0, "it preempts")
    await eventually(lambda: worker.running <= 12, "the slots follow", limit_s=20)
    before = figure(worker, "inferq_engine_preemptions")
    bodies = {(await client.answer(job, limit_s=60)).body.split(b'"choices"')[1] for job in jobs}
    assert bodies == {alone.body.split(b'"choices"')[1]}
    assert figure(worker, "inferq_engine_preemptions") - before < 40


class Talker:
    """An engine that answers each request after a while, and whose metrics page is what a test writes."""

    def __init__(self) -> None:
        self.page: Callable[[], bytes | None] = lambda: None
        """The whole HTTP answer; None: no answer at all."""
        self.read = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
                await reader.readexactly(int(lines.get(b"content-length", 0)))
                if head.startswith(b"GET /metrics"):
                    self.read += 1
                    page = self.page()
                    if page is None:
                        await asyncio.sleep(3600)
                    writer.write(page or b"")
                elif head.startswith(b"GET"):
                    writer.write(whole(MODELS))
                else:
                    await asyncio.sleep(0.3)
                    writer.write(whole(b"{}"))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def talker(fleet: LocalFleet, page: Callable[[], bytes | None]) -> AsyncIterator[tuple[Talker, LocalWorker]]:
    """An engine that says ``page`` at first, with a worker of 8 slots."""
    engine = Talker()
    engine.page = page
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    options = ("--engine", "url", "--engine-url", url, "--slots", "8", "--engine-load-interval-ms", "50")
    try:
        yield engine, await fleet.worker("w1", *options).until_ready()
    finally:
        server.close()


def waits(value: bytes) -> Callable[[], bytes]:
    return lambda: whole(b"vllm:num_requests_waiting " + value + b"\n")


HUGE = b"vllm:num_requests_waiting 5\n" + b"vllm:noise 1\n" * 8_000_000
BAD = {
    "missing": lambda: whole(b"", b"404 Not Found"),
    "failing": lambda: whole(LOAD % (5, 3), b"500 Internal Server Error"),
    "empty": lambda: whole(b""),
    "NaN": waits(b"NaN"),
    "negative": waits(b"-3"),
    "1e308": waits(b"1e308"),
    "100 MB": lambda: whole(HUGE),
    "slow": lambda: None,
    "cut": lambda: b"HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\nvllm:num_requests_waiting 5\n",
}


@pytest.mark.parametrize("kind", BAD)
async def test_metrics_that_cannot_be_believed_bring_the_setting_back(
    fleet: LocalFleet, client: Client, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing, absurd, endless or late: the worker runs as many jobs as it is set to, and answers them."""
    monkeypatch.setattr(http, "PROGRESS_LIMIT_S", 0.3)
    async with talker(fleet, lambda: whole(LOAD % (5, 3))) as (engine, worker):
        jobs = [await client.send(model="open") for _ in range(60)]
        await eventually(lambda: worker.worker.status().slots <= 3, "what waits lowers the slots")
        engine.page = BAD[kind]
        await eventually(lambda: worker.worker.status().slots == 8, "the setting is back", limit_s=15)
        await eventually(lambda: worker.running == 8, "all slots are used")
        for job in jobs:
            assert (await client.answer(job)).status == 200


async def test_an_engine_that_tells_no_load_is_not_asked_while_it_works(fleet: LocalFleet, client: Client) -> None:
    """It may serve one request at a time, and end it for the next."""
    async with talker(fleet, BAD["missing"]) as (engine, worker):
        await eventually(lambda: engine.read >= 4, "it is asked while it is idle", limit_s=15)
        jobs = [await client.send(model="open") for _ in range(40)]
        await client.begun(jobs[0])
        asked = engine.read
        await client.answer(jobs[16])
        assert engine.read == asked
        assert worker.worker.status().slots == 8


async def test_the_slots_stay_as_set_where_the_load_is_not_read(fleet: LocalFleet, client: Client) -> None:
    """``--engine-load-interval-ms 0`` switches it off."""
    worker = await fleet.worker("w1", "--slots", "8", "--sim-max-num-seqs", "2", OFTEN[0], "0").until_ready()
    jobs = [await client.send(max_tokens=10) for _ in range(24)]
    await eventually(lambda: worker.running == 8, "all slots are used")
    for job in jobs:
        await client.answer(job)
    assert worker.worker.status().slots == 8
    assert 'inferq_engine_requests{state="waiting"} NaN' in worker.metrics()
