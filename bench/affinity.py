"""Prefix affinity against round robin and least loaded, on a part of a trace with the blocks of its prompts.

``python -m bench.affinity mooncake_conversation.jsonl.gz`` takes every n-th conversation of the trace,
in their order and faster, and sends it as streams to four engines with prefix caches: through inferq, through it with
affinity off (the worker with the most free slots is handed the next request), and round robin without a queue; and
simulates the same. The oracle is one cache of the whole trace that forgets nothing. Exit code 1 if a figure misses what
is promised.
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
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import uvloop
from rich.console import Console

from simulator import SimulationOptions, Trace, load_trace, simulate
from simulator.engines import PROFILES
from simulator.measures import percentile
from simulator.policies import QueueRules
from simulator.requests import TraceRequest
from telemetry.environment import free_port
from worker.engines.simulated.schedule import Pace

from .processes import new_folder, running, until_answers
from .report import Sheet
from .simulator_check import hit_rate, prompt_of, stream
from .systems import MODEL, whole_inferq

TTFT_MS = 20.0
HOP_S = 0.004
CACHE_BLOCKS = 100_000
MAX_PROMPT_TOKENS = 200_000
SHARED_BY = 0.01
"""A block in more than this share of the requests is no conversation's own."""
SYSTEMS = ("round robin", "least loaded", "affinity")


@dataclass(frozen=True, slots=True)
class Found:
    """What one system reached: ``ttft_s`` are the mean, p50, p90 and p99."""

    ttft_s: tuple[float, float, float, float]
    hit_rate: float
    requests_per_s: float


def part_of(trace: Trace, every: int, limit: int) -> list[TraceRequest]:
    """The requests of every ``every``-th conversation, the first ``limit`` of them, from the time 0 on."""
    lines = list(trace.requests())
    common = Counter(block for line in lines for block in set(line.blocks))
    numbers: dict[int, int] = {}
    taken = []
    for line in lines:
        own = next((block for block in line.blocks if common[block] <= SHARED_BY * len(lines)), -1)
        if numbers.setdefault(own, len(numbers)) % every == 0:
            taken.append(line)
    return [line._replace(at_s=line.at_s - taken[0].at_s) for line in taken[:limit]]


def oracle(lines: Sequence[TraceRequest], block_tokens: int) -> float:
    """The hit rate of one cache that forgets nothing."""
    known: set[int] = set()
    queried = hit = 0
    for line in lines:
        held = next((n for n, block in enumerate(line.blocks) if block not in known), len(line.blocks))
        known.update(line.blocks)
        queried += line.prompt_tokens
        hit += min(held, max(line.prompt_tokens - 1, 0) // block_tokens) * block_tokens
    return hit / max(queried, 1)


@asynccontextmanager
async def engines(folder: Path, options: argparse.Namespace, block_tokens: int) -> AsyncIterator[list[str]]:
    """The engines' URLs."""
    arguments = (
        *("--model", MODEL, "--ttft-ms", str(TTFT_MS), "--prefill-us-per-token", str(options.prefill_us)),
        *("--tokens-per-s", str(options.tokens_per_s), "--block-tokens", str(block_tokens)),
        *("--prefix-cache-blocks", str(CACHE_BLOCKS), "--max-num-seqs", str(options.slots)),
        *("--max-model-len", str(MAX_PROMPT_TOKENS), "--serial-prefill"),
    )
    async with AsyncExitStack() as exits:
        urls = []
        for number in range(options.workers):
            port, log = free_port(), folder / f"engine-{number}.log"
            pid = await exits.enter_async_context(
                running("worker.engines.simulated", ("--port", str(port), *arguments), log)
            )
            urls.append(f"http://127.0.0.1:{port}")
            await until_answers(f"{urls[-1]}/health", log, pid=pid)
        yield urls


async def replay(lines: Sequence[TraceRequest], urls: Sequence[str], speed: float, block_tokens: int) -> list[float]:
    """Send each request at its time, to the URLs in turn. Answers the time to each first token."""
    bodies = [
        json.dumps(
            {
                "model": MODEL,
                "prompt": prompt_of(number, line, block_tokens),
                "max_tokens": line.output_tokens,
                "ignore_eos": True,
                "stream": True,
            }
        ).encode()
        for number, line in enumerate(lines)
    ]
    gc.freeze()
    async with AsyncExitStack() as exits, asyncio.TaskGroup() as group:
        sessions = [
            await exits.enter_async_context(aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)))
            for url in urls
        ]
        began, tasks = time.monotonic(), []
        for number, (line, body) in enumerate(zip(lines, bodies, strict=True)):
            await asyncio.sleep(max(began + line.at_s / speed - time.monotonic(), 0))
            tasks.append(group.create_task(stream(sessions[number % len(sessions)], body)))
        answers = await asyncio.gather(*tasks)
    return [answer.first_s for answer in answers]


async def measured(system: str, options: argparse.Namespace, lines: Sequence[TraceRequest], block_tokens: int) -> Found:
    """The figures of one system with engines of its own, whose caches are empty."""
    with tempfile.TemporaryDirectory(prefix="inferq-bench-") as name:
        folder = Path(name)
        async with AsyncExitStack() as exits:
            urls = await exits.enter_async_context(engines(new_folder(folder / "engines"), options, block_tokens))
            targets = urls
            if system != "round robin":
                router_options = () if system == "affinity" else ("--no-affinity",)
                found, _ = await exits.enter_async_context(
                    whole_inferq(
                        new_folder(folder / "inferq"),
                        *urls,
                        slots=options.slots,
                        workers=options.workers,
                        router_options=router_options,
                    )
                )
                targets = [f"http://127.0.0.1:{found.port}"]
            began = time.monotonic()
            ttft_s = await replay(lines, targets, options.speed, block_tokens)
            lasted_s = time.monotonic() - began
            p50, p90, p99 = (percentile(sorted(ttft_s), share) for share in (0.5, 0.9, 0.99))
            return Found((statistics.mean(ttft_s), p50, p90, p99), await hit_rate(urls), len(lines) / lasted_s)


def simulated(system: str, options: argparse.Namespace, lines: Sequence[TraceRequest], block_tokens: int) -> Found:
    """The same of the simulator."""
    profile = dataclasses.replace(
        PROFILES["simulated"],
        pace=Pace(
            TTFT_MS / 1e3, options.prefill_us / 1e6, 1 / options.tokens_per_s, lockstep=True, serial_prefill=True
        ),
        kv_tokens=CACHE_BLOCKS * block_tokens,
        max_seqs=options.slots,
    )
    at_speed = [line._replace(at_s=line.at_s / options.speed) for line in lines]
    found = simulate(
        Trace(system, lambda: at_speed, block_tokens),
        SimulationOptions(
            policy="round-robin" if system == "round robin" else "inferq",
            workers=options.workers,
            slots=options.slots,
            profile=profile,
            hop_s=HOP_S,
            rules=QueueRules(affinity=system == "affinity"),
        ),
    )
    ttft_s = (found.ttft_mean_s, found.ttft_p50_s, found.ttft_p90_s, found.ttft_p99_s)
    return Found(ttft_s, found.hit_rate, found.requests_per_s)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench."""
    parser = argparse.ArgumentParser(prog="python -m bench.affinity", description=__doc__)
    parser.add_argument("trace", help="a trace with blocks, in Mooncake's format")
    parser.add_argument("--every", type=int, default=20, help="take every so many-th conversation")
    parser.add_argument("--limit", type=int, default=600, help="requests")
    parser.add_argument("--speed", type=float, default=50.0, help="times faster than the trace")
    parser.add_argument("--output-scale", type=int, default=16, help="divides the lengths of answers")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--slots", type=int, default=8, help="requests that an engine runs at once")
    parser.add_argument("--prefill-us", type=float, default=40.0, help="to compute a token of a prompt")
    parser.add_argument("--tokens-per-s", type=float, default=50.0)
    parser.add_argument("--system", action="append", choices=SYSTEMS)
    options = parser.parse_args(argv)
    trace = load_trace(options.trace, seed=1)
    lines = [
        line._replace(output_tokens=max(line.output_tokens // options.output_scale, 1))
        for line in part_of(trace, options.every, options.limit)
    ]
    best = oracle(lines, trace.block_tokens)
    found = {
        system: uvloop.run(measured(system, options, lines, trace.block_tokens)) for system in options.system or SYSTEMS
    }
    rows = []
    for system, one in found.items():
        rows.append(_row(system, one, best))
        rows.append(_row(f"{system}, simulated", simulated(system, options, lines, trace.block_tokens), best))
    rows.append(("oracle", f"{best * 100:.1f}", "100", *[""] * 5))
    title = f"{len(lines)} requests, {lines[-1].at_s / options.speed:.0f} s, {options.workers} x {options.slots} slots"
    names = ("", "hits, %", "of the oracle's, %", "TTFT mean, ms", "p50", "p90", "p99", "requests/s")
    Sheet(title, names, rows).printed(Console(width=120))
    return int(set(SYSTEMS) <= found.keys() and not _is_as_promised(found, best))


def _row(name: str, one: Found, best: float) -> tuple[str, ...]:
    hits = (f"{one.hit_rate * 100:.1f}", f"{one.hit_rate / best * 100:.0f}")
    return (name, *hits, *(f"{value * 1e3:,.0f}" for value in one.ttft_s), f"{one.requests_per_s:.1f}")


def _is_as_promised(found: dict[str, Found], best: float) -> bool:
    ours, even, turns = found["affinity"], found["least loaded"], found["round robin"]
    return ours.hit_rate >= 0.95 * best and 2 * ours.ttft_s[0] <= turns.ttft_s[0] and ours.ttft_s[3] <= even.ttft_s[3]


if __name__ == "__main__":
    sys.exit(main())
