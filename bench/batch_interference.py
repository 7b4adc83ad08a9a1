"""Measure the effect of a saturating batch on interactive latency, and what preemption costs the batch.

``python -m bench.batch_interference`` starts two whole inferqs with batchers, each on a simulated engine of its own;
the lines of one may not yield. In turns it sends the same paced interactive streams to an idle fleet, beside a batch
that fills every slot, and beside one whose lines may yield. It prints percentiles of the time to the first token, and
how many lines the batches finished meanwhile. Requests come at random times at a fixed rate, whatever their answers
take: both batches share the slots with the same interactive load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import redis.asyncio as redis
import uvloop
from rich.console import Console
from rich.table import Table

from queue_schemas.keys import ShardKeys
from telemetry.environment import free_port
from tests.support.waiting import eventually

from .processes import new_folder, running, until_answers
from .systems import MODEL, with_batcher

BATCH_LIMIT_S = 60.0
_POLL_S = 0.1
_WARM_UP_S = 2.0
_COUNTED = ("done", "yielded", "asked_to_yield")


@dataclass(frozen=True, slots=True)
class Fleet:
    """A whole inferq that takes batches: its HTTP API, and its queue."""

    name: str
    session: aiohttp.ClientSession
    queue: redis.Redis

    async def counts(self) -> dict[str, int]:
        """What happened to lines so far, by the queue's own count."""
        values = await self.queue.hmget(ShardKeys(0).counters, [f"{MODEL}:batch:{event}" for event in _COUNTED])
        return {event: int(value or 0) for event, value in zip(_COUNTED, values, strict=True)}


@dataclass(frozen=True, slots=True)
class Window:
    """What one load met: times to the first token (ms), and what happened to lines of a batch meanwhile."""

    first_ms: Sequence[float]
    seconds: float
    lines: dict[str, int]

    def percentile(self, share: float) -> float:
        """The time that ``share`` of the streams did not exceed."""
        return sorted(self.first_ms)[min(int(share * len(self.first_ms)), len(self.first_ms) - 1)]


@asynccontextmanager
async def fleet(folder: Path, name: str, options: argparse.Namespace, *, max_yields: int) -> AsyncIterator[Fleet]:
    """A fleet on an engine of its own, whose lines yield so often."""
    port, log = free_port(), new_folder(folder) / "engine.log"
    simulated = ("--port", str(port), "--model", MODEL, "--mode", "text", "--ttft-ms", str(options.ttft_ms))
    speed = ("--tokens-per-s", str(options.tokens_per_s), "--max-num-seqs", str(2 * options.slots))
    async with running("worker.engines.simulated", (*simulated, *speed), log):
        await until_answers(f"http://127.0.0.1:{port}/health", log)
        url, batcher = f"http://127.0.0.1:{port}", ("--max-yields", str(max_yields))
        async with (
            with_batcher(folder, url, slots=options.slots, batcher_options=batcher) as (system, queue_url),
            aiohttp.ClientSession(f"http://127.0.0.1:{system.port}", connector=aiohttp.TCPConnector(limit=0)) as own,
            redis.Redis.from_url(queue_url) as queue,
        ):
            yield Fleet(name, own, queue)


class Batch:
    """A batch that fills every slot until it is cancelled."""

    def __init__(self, session: aiohttp.ClientSession, lines: int, tokens: int) -> None:
        self._session = session
        self._lines = lines
        self._tokens = tokens
        self._id = ""

    async def start(self, lines: int) -> None:
        """Returns once it has finished so many lines."""
        form = aiohttp.FormData()
        form.add_field("purpose", "batch")
        form.add_field("file", self._input(), filename="lines.jsonl")
        async with self._session.post("/v1/files", data=form) as answer:
            answer.raise_for_status()
            file_id = (await answer.json())["id"]
        fields = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        async with self._session.post("/v1/batches", json=fields) as answer:
            answer.raise_for_status()
            self._id = (await answer.json())["id"]
        await self._until(lambda batch: batch["request_counts"]["completed"] >= lines, f"has finished {lines} lines")

    async def running(self) -> bool:
        """Whether it still has lines to run."""
        batch = await self._poll()
        return str(batch["status"]) == "in_progress"

    async def completed(self) -> int:
        """How many lines it has finished."""
        return int((await self._poll())["request_counts"]["completed"])

    async def stop(self) -> int:
        """Cancel it; how many lines it had finished."""
        async with self._session.post(f"/v1/batches/{self._id}/cancel") as answer:
            answer.raise_for_status()
        batch = await self._until(lambda batch: batch["status"] == "cancelled", "is cancelled")
        return int(batch["request_counts"]["completed"])

    async def _until(self, condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        async def matching() -> dict[str, Any] | None:
            batch = await self._poll()
            return batch if condition(batch) else None

        found: dict[str, Any] | None = await eventually(
            matching, f"the batch {what}", limit_s=BATCH_LIMIT_S, every_s=_POLL_S
        )
        assert found is not None
        return found

    async def _poll(self) -> dict[str, Any]:
        async with self._session.get(f"/v1/batches/{self._id}") as answer:
            answer.raise_for_status()
            return dict(await answer.json())

    def _input(self) -> bytes:
        body: dict[str, object] = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me of the sea."}]}
        body |= {"max_tokens": self._tokens, "ignore_eos": True}
        line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
        return b"".join(json.dumps({"custom_id": str(n), **line}).encode() + b"\n" for n in range(self._lines))


async def load(one: Fleet, options: argparse.Namespace, seed: int) -> Window:
    """Send streams at random times for a while, and measure those that begin after a warm-up."""
    rng, begun = random.Random(seed), time.monotonic()
    firsts: list[float] = []
    async with asyncio.TaskGroup() as group:
        due = 0.0
        before, started = await one.counts(), begun
        while (due := due + rng.expovariate(options.rate)) < _WARM_UP_S + options.seconds:
            await asyncio.sleep(max(0.0, begun + due - time.monotonic()))
            if due < _WARM_UP_S:
                before, started = await one.counts(), time.monotonic()
            group.create_task(_stream(one.session, options.stream_tokens, firsts if due >= _WARM_UP_S else []))
        after, ended = await one.counts(), time.monotonic()
    return Window(firsts, ended - started, {event: after[event] - before[event] for event in _COUNTED})


async def _stream(session: aiohttp.ClientSession, tokens: int, firsts: list[float]) -> None:
    body: dict[str, object] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello."}], "stream": True}
    sent = time.monotonic()
    first = None
    async with session.post("/v1/chat/completions", json=body | {"max_tokens": tokens, "ignore_eos": True}) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if first is None and line.startswith(b"data: {"):
                first = (time.monotonic() - sent) * 1000
    if first is None:
        raise ValueError("a stream ended without a token")
    firsts.append(first)


async def _beside_a_batch(one: Fleet, options: argparse.Namespace, seed: int) -> Window:
    batch = Batch(one.session, options.lines, options.tokens)
    await batch.start(2 * options.slots)
    window = await load(one, options, seed)
    if not await batch.running():
        raise TimeoutError("the batch ended before the streams did: give it more --lines")
    await batch.stop()
    return window


async def _all(options: argparse.Namespace, console: Console) -> None:
    windows: dict[str, list[Window]] = {"idle": [], "without preemption": [], "with preemption": []}
    with tempfile.TemporaryDirectory(prefix="inferq-bench-") as name:
        folder = Path(name)
        async with (
            fleet(folder / "without", "without preemption", options, max_yields=0) as without,
            fleet(folder / "with", "with preemption", options, max_yields=options.max_yields) as having,
        ):
            for number in range(options.rounds):
                for way in _in_turn(list(windows), number):
                    one = without if way == "without preemption" else having
                    measure = load if way == "idle" else _beside_a_batch
                    window = await measure(one, options, number)
                    windows[way].append(window)
                    p50, p90 = window.percentile(0.5), window.percentile(0.9)
                    console.print(f"round {number + 1}  {way}: TTFT p50 {p50:.1f} p90 {p90:.1f} ms, {window.lines}")
    _print(windows, options, console)


def _in_turn(ways: list[str], number: int) -> list[str]:
    """The ways in another order in each round."""
    first = number % len(ways)
    return ways[first:] + ways[:first]


def _print(windows: dict[str, list[Window]], options: argparse.Namespace, console: Console) -> None:
    line_ms = options.ttft_ms + options.tokens / options.tokens_per_s * 1000
    table = Table(title=f"{options.slots} slots, lines of {line_ms:g} ms, {options.rate:g} streams a second")
    for column in ("", "TTFT p50, ms", "p90", "p99", "p90 / idle", "lines/s", "yields/s"):
        table.add_column(column, justify="right")
    firsts = {way: {p: _median(found, p) for p in (0.5, 0.9, 0.99)} for way, found in windows.items()}
    rates = {way: _rate(found, "done") for way, found in windows.items()}
    for way, found in windows.items():
        times = [f"{value:,.1f}" for value in firsts[way].values()]
        ratio = f"{firsts[way][0.9] / firsts['idle'][0.9]:.2f}"
        table.add_row(way, *times, ratio, f"{rates[way]:.2f}", f"{_rate(found, 'yielded'):.2f}")
    console.print(table)
    console.print(f"batch throughput with / without: {rates['with preemption'] / rates['without preemption']:.3f}")


def _median(windows: Sequence[Window], share: float) -> float:
    return statistics.median(window.percentile(share) for window in windows)


def _rate(windows: Sequence[Window], event: str) -> float:
    return sum(window.lines[event] for window in windows) / sum(window.seconds for window in windows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.batch_interference", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each load")
    parser.add_argument("--rate", type=float, default=4.0, help="interactive streams a second")
    parser.add_argument("--stream-tokens", type=int, default=32, help="tokens of each stream")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--lines", type=int, default=5_000, help="lines of each batch, which is cancelled in the end")
    parser.add_argument("--tokens", type=int, default=100, help="tokens of each line's answer")
    parser.add_argument("--ttft-ms", type=float, default=20.0, help="the engine's time to the first token")
    parser.add_argument("--tokens-per-s", type=float, default=100.0, help="the engine's speed for each request")
    parser.add_argument("--max-yields", type=int, default=4)
    uvloop.run(_all(parser.parse_args(argv), Console(width=120)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
