"""Check the simulator against a real fleet: the same trace, the same engines, the same figures within 10 %.

``python -m bench.simulator_check`` starts a whole inferq with simulated engines as processes of their own, sends a
generated trace to it as streams at the trace's times, simulates the same trace with the same engines, and prints both.
Exit code 1 if a figure differs by more than the limit.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import uvloop
from rich.console import Console

from simulator import SimulationOptions, Summary, Trace, load_trace, simulate
from simulator.engines import PROFILES, EngineProfile
from simulator.measures import percentile
from simulator.requests import TraceRequest
from telemetry.environment import free_port
from worker.engines.simulated.schedule import Pace

from .processes import new_folder, running, until_answers
from .report import Sheet
from .systems import MODEL, System, whole_inferq

TTFT_MS, PREFILL_US, TOKENS_PER_S = 40.0, 400.0, 50.0
CACHE_BLOCKS = 400
CHARS_PER_TOKEN = 4
FIGURES = ("TTFT mean, ms", "TTFT p90, ms", "requests/s", "output tokens/s", "prefix hits, %")


@dataclass(frozen=True, slots=True)
class Answer:
    """One stream: seconds until its first token and its end, and its tokens."""

    first_s: float
    last_s: float
    tokens: int


def smaller(trace: Trace, scale: int) -> Trace:
    """The trace with all lengths divided by ``scale``: what one machine serves in real time."""

    def requests() -> Iterable[TraceRequest]:
        size = trace.block_tokens // scale
        for line in trace.requests():
            prompt = max(line.prompt_tokens // scale, len(line.blocks) * size, 1)
            yield line._replace(prompt_tokens=prompt, output_tokens=max(line.output_tokens // scale, 1))

    return Trace(trace.name, requests, trace.block_tokens // scale)


def prompt_of(number: int, line: TraceRequest, block_tokens: int) -> str:
    """A text of as many tokens as ``line`` says, equal blocks for equal ids and else its own."""
    size = block_tokens * CHARS_PER_TOKEN
    blocks = "".join(f"block {block} ".ljust(size, ".") for block in line.blocks)
    rest = line.prompt_tokens * CHARS_PER_TOKEN - len(blocks)
    return blocks + f"request {number} ".ljust(rest, ".")[:rest]


@asynccontextmanager
async def engines(folder: Path, count: int, block_tokens: int) -> AsyncIterator[list[str]]:
    """``count`` simulated engines: their URLs."""
    options = (
        *("--model", MODEL, "--ttft-ms", str(TTFT_MS), "--prefill-us-per-token", str(PREFILL_US)),
        *("--tokens-per-s", str(TOKENS_PER_S), "--block-tokens", str(block_tokens)),
        *("--prefix-cache-blocks", str(CACHE_BLOCKS)),
    )
    async with AsyncExitStack() as exits:
        urls = []
        for number in range(count):
            port, log = free_port(), folder / f"engine-{number}.log"
            pid = await exits.enter_async_context(
                running("worker.engines.simulated", ("--port", str(port), *options), log)
            )
            urls.append(f"http://127.0.0.1:{port}")
            await until_answers(f"{urls[-1]}/health", log, pid=pid)
        yield urls


async def stream(session: aiohttp.ClientSession, body: bytes) -> Answer:
    """Send one request and read its stream to the end."""
    began = time.monotonic()
    first_s, tokens = 0.0, 0
    headers = {"content-type": "application/json"}
    async with session.post("/v1/completions", data=body, headers=headers) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                first_s = first_s or time.monotonic() - began
                tokens += 1
    return Answer(first_s, time.monotonic() - began, tokens)


async def replay(system: System, trace: Trace) -> tuple[list[Answer], float]:
    """Send the trace at its times; the answers, and how long it took from the first to the last."""
    lines = list(trace.requests())
    bodies = [
        json.dumps(
            {
                "model": MODEL,
                "prompt": prompt_of(number, line, trace.block_tokens),
                "max_tokens": line.output_tokens,
                "ignore_eos": True,
                "stream": True,
            }
        ).encode()
        for number, line in enumerate(lines)
    ]
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{system.port}", connector=connector) as session:
        await asyncio.gather(*(stream(session, bodies[0]) for _ in range(2)))  # connections and code are warm
        began = time.monotonic()
        tasks = []
        async with asyncio.TaskGroup() as group:
            for line, body in zip(lines, bodies, strict=True):
                await asyncio.sleep(max(began + line.at_s - time.monotonic(), 0))
                tasks.append(group.create_task(stream(session, body)))
        return [task.result() for task in tasks], time.monotonic() - began


async def hit_rate(urls: Sequence[str]) -> float:
    """Cached over all prompt tokens, as the engines count them."""
    found = {"queries": 0.0, "hits": 0.0}
    async with aiohttp.ClientSession() as session:
        for url in urls:
            async with session.get(f"{url}/metrics") as answer:
                for line in (await answer.text()).splitlines():
                    for name in found:
                        if line.startswith(f"vllm:prefix_cache_{name}_total"):
                            found[name] += float(line.rpartition(" ")[2])
    return found["hits"] / max(found["queries"], 1)


async def measured(options: argparse.Namespace, trace: Trace) -> dict[str, float]:
    """The figures of the real fleet."""
    with tempfile.TemporaryDirectory(prefix="inferq-bench-") as name:
        folder = Path(name)
        async with (
            engines(new_folder(folder / "engines"), options.workers, trace.block_tokens) as urls,
            whole_inferq(new_folder(folder / "inferq"), *urls, slots=options.slots, workers=options.workers) as (
                system,
                _,
            ),
        ):
            gc.freeze()
            answers, lasted_s = await replay(system, trace)
            hits = await hit_rate(urls)
    firsts = sorted(answer.first_s for answer in answers)
    tokens = sum(line.output_tokens for line in trace.requests())
    values = (
        statistics.mean(firsts) * 1e3,
        percentile(firsts, 0.9) * 1e3,
        len(answers) / lasted_s,
        tokens / lasted_s,
        hits * 100,
    )
    return dict(zip(FIGURES, values, strict=True))


def simulated(options: argparse.Namespace, trace: Trace) -> dict[str, float]:
    """The same figures of the simulator."""
    profile: EngineProfile = dataclasses.replace(
        PROFILES["simulated"],
        pace=Pace(TTFT_MS / 1e3, PREFILL_US / 1e6, 1 / TOKENS_PER_S, lockstep=True),
        kv_tokens=CACHE_BLOCKS * trace.block_tokens,
    )
    found: Summary = simulate(
        trace,
        SimulationOptions(workers=options.workers, slots=options.slots, profile=profile, hop_s=options.hop_ms / 1e3),
    )
    values = (
        found.ttft_mean_s * 1e3,
        found.ttft_p90_s * 1e3,
        found.requests_per_s,
        found.output_tokens_per_s,
        found.hit_rate * 100,
    )
    return dict(zip(FIGURES, values, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check."""
    parser = argparse.ArgumentParser(prog="python -m bench.simulator_check", description=__doc__)
    parser.add_argument(
        "--trace", default="poisson:requests=600,rate=16,sessions=60,prefix=2048,prompt=1600,output=320"
    )
    parser.add_argument("--limit", type=int, default=None, help="requests")
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--scale", type=int, default=8, help="divides all lengths, those of blocks too")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--slots", type=int, default=6)
    parser.add_argument("--hop-ms", type=float, default=4.0, help="of the simulator")
    parser.add_argument("--max-difference", type=float, default=0.1)
    options = parser.parse_args(argv)
    whole = load_trace(options.trace, seed=options.seed).scaled(speed=options.speed, limit=options.limit)
    trace = smaller(whole, options.scale)
    expected = simulated(options, trace)
    real = uvloop.run(measured(options, trace))
    rows, worst = [], 0.0
    for name in FIGURES:
        difference = (expected[name] - real[name]) / real[name] if real[name] else 0.0
        worst = max(worst, abs(difference))
        rows.append((name, f"{real[name]:,.1f}", f"{expected[name]:,.1f}", f"{difference * 100:+.1f} %"))
    Sheet(trace.name, ("", "real fleet", "simulator", "difference"), rows).printed(Console(width=120))
    return int(worst > options.max_difference)


if __name__ == "__main__":
    sys.exit(main())
