"""Measure slots that follow the engine: interactive TTFT behind a saturating batch, and what waits inside the engine.

``python -m bench.engine_slots`` runs the same load three times on a simulated engine in a process of its own: with
exactly as many slots as it runs, with four times as many, and with four times as many that follow its load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import uvloop
from rich.console import Console
from rich.table import Table

from simulator.measures import percentile
from telemetry.environment import free_port

from .batch_interference import Batch
from .processes import new_folder, running, until_answers
from .systems import MODEL, with_batcher

_SAMPLE_S = 0.2


@dataclass(slots=True)
class Outcome:
    """What one way of setting slots came to."""

    firsts_ms: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)
    running: list[float] = field(default_factory=list)
    lines_per_s: float = 0.0


async def _stream(session: aiohttp.ClientSession, outcome: Outcome) -> None:
    body = {"model": MODEL, "stream": True, "max_tokens": 10, "messages": [{"role": "user", "content": "Hello"}]}
    begin = time.monotonic()
    async with session.post("/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: "):
                outcome.firsts_ms.append((time.monotonic() - begin) * 1000)
                break
        await answer.read()


async def _sample_engine(url: str, outcome: Outcome) -> None:
    async with aiohttp.ClientSession(url) as session:
        while True:
            async with session.get("/metrics") as answer:
                page = await answer.text()
            for state, samples in (("waiting", outcome.waiting), ("running", outcome.running)):
                found = re.search(rf"^vllm:num_requests_{state}\{{.*\}} (\S+)$", page, re.MULTILINE)
                samples.append(float(found[1]) if found else 0.0)
            await asyncio.sleep(_SAMPLE_S)


async def _measured(folder: Path, slots: int, worker_options: Sequence[str], options: argparse.Namespace) -> Outcome:
    outcome = Outcome()
    engine_port, log = free_port(), folder / "engine.log"
    engine = ("--port", str(engine_port), "--model", MODEL, "--max-num-seqs", str(options.capacity))
    engine_url = f"http://127.0.0.1:{engine_port}"
    speed = ("--tokens-per-s", str(options.tokens_per_s))
    async with running("worker.engines.simulated", (*engine, *speed), log) as pid:
        await until_answers(f"{engine_url}/health", log, pid=pid)
        async with (
            with_batcher(new_folder(folder / "inferq"), engine_url, slots=slots, worker_options=worker_options) as (
                system,
                _,
            ),
            aiohttp.ClientSession(f"http://127.0.0.1:{system.port}") as session,
        ):
            batch = Batch(session, options.lines, options.tokens)
            await batch.start(slots)
            await asyncio.sleep(options.settle)
            before, begin = await batch.completed(), time.monotonic()
            sampling = asyncio.create_task(_sample_engine(engine_url, outcome))
            async with asyncio.TaskGroup() as group:
                while time.monotonic() - begin < options.seconds:
                    group.create_task(_stream(session, outcome))
                    await asyncio.sleep(1 / options.rate)
            outcome.lines_per_s = (await batch.completed() - before) / (time.monotonic() - begin)
            sampling.cancel()
            if not await batch.running():
                raise TimeoutError("the batch ended before the streams did: give it more --lines")
            await batch.stop()
    return outcome


async def _all(options: argparse.Namespace, console: Console) -> None:
    many = 4 * options.capacity
    fixed = ("--engine-load-interval-ms", "0")
    ways = {
        f"{options.capacity} slots, as many as it runs": (options.capacity, fixed),
        f"{many} slots": (many, fixed),
        f"{many} slots that follow its load": (many, ()),
    }
    table = Table(title=f"An engine that runs {options.capacity}; a batch, and {options.rate:g} streams a second")
    for column in ("", "TTFT p50, ms", "TTFT p90, ms", "waiting inside", "running", "lines/s"):
        table.add_column(column, justify="right")
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="inferq-bench-") as name:
        for number, (way, (slots, worker_options)) in enumerate(ways.items()):
            outcome = await _measured(new_folder(Path(name) / str(number)), slots, worker_options, options)
            found[way] = {
                "p50": percentile(sorted(outcome.firsts_ms), 0.5),
                "p90": percentile(sorted(outcome.firsts_ms), 0.9),
                "waiting": statistics.mean(outcome.waiting),
                "running": statistics.mean(outcome.running),
                "lines": outcome.lines_per_s,
            }
            table.add_row(way, *(f"{value:,.1f}" for value in found[way].values()))
    console.print(table)
    console.print(json.dumps(found))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.engine_slots", description=__doc__)
    parser.add_argument("--capacity", type=int, default=16, help="requests that the engine runs at once")
    parser.add_argument("--tokens-per-s", type=float, default=40.0, help="of each request")
    parser.add_argument("--tokens", type=int, default=60, help="of each line's answer")
    parser.add_argument("--lines", type=int, default=5_000, help="lines of each batch, which is cancelled in the end")
    parser.add_argument("--rate", type=float, default=3.0, help="interactive streams a second")
    parser.add_argument("--settle", type=float, default=15.0, help="seconds of the batch before the streams begin")
    parser.add_argument("--seconds", type=float, default=40.0, help="length of each load")
    uvloop.run(_all(parser.parse_args(argv), Console(width=120)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
