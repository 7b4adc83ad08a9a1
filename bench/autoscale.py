"""Measure the autoscaler: what fleets reach on a trace, simulated, and a real one under a burst, from none and back.

``python -m bench.autoscale TRACE`` simulates the trace with inferq's autoscaler, with KEDA's two ways of counting
requests, with fixed fleets and with one that is there exactly while it has work. It prints the objectives that each
meets and the GPU hours that it costs, and draws both with ``--plot``. Then it sends a burst to a pool without workers,
whose autoscaler has the ``process`` driver, and counts answers until the last worker is gone: a minute or two.
``--skip simulation`` and ``--skip fleet`` leave one half out. Exit code 1 if a request of the burst failed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from rich.console import Console

from scheduling.autoscale import ScalingRules
from simulator import SimulationOptions, Summary, load_trace, simulate
from simulator.engines import PROFILES
from simulator.plot import draw
from simulator.policies import QueueRules
from simulator.scaling import InferqAutoscaler, LagCount, Scaler
from telemetry.environment import free_port
from tests.support.waiting import eventually

from .processes import new_folder, running, until_answers
from .report import Sheet
from .systems import MODEL, queue_and_manager

ENGINE = "h100-llama-3.1-8b"
LIMIT_S = 60.0
"""How long the real fleet has to grow, to answer, and to be gone."""
_MAX_WORKERS, _SLOTS = 3, 4


@dataclass(frozen=True, slots=True)
class Case:
    """One way to size a fleet. ``setting``: the wait to plan for (ms), requests for each worker, or workers."""

    fleet: str
    setting: float = 0

    @property
    def name(self) -> str:
        return f"{self.fleet}, {self.setting:g}" if self.setting else self.fleet


def cases(options: argparse.Namespace) -> list[Case]:
    """All that are compared; ours first."""
    return [
        *(Case("inferq's autoscaler", wait) for wait in options.target_wait_ms),
        *(Case("queue length over", threshold) for threshold in options.threshold),
        *(Case("lag over", threshold) for threshold in options.threshold),
        *(Case("fixed", workers) for workers in options.workers),
        Case("clairvoyant"),
    ]


def simulated(options: argparse.Namespace, case: Case) -> Summary:
    """The figures of one case."""
    trace = load_trace(options.trace, seed=1).scaled(copies=options.copies, limit=options.limit)
    profile, slots = PROFILES[ENGINE], options.slots
    clairvoyant = case.fleet == "clairvoyant"
    simulation = SimulationOptions(
        policy="oracle" if clairvoyant else "inferq",
        workers=int(case.setting) if case.fleet == "fixed" else options.min,
        slots=slots,
        profile=profile,
        rules=QueueRules(max_slots=options.max_slots),
        clairvoyant=clairvoyant,
    )
    scaler: Scaler | None = None
    if case.fleet.startswith("inferq"):
        rules = ScalingRules(min=options.min, max=options.max, worker_slots=slots, target_wait_ms=case.setting)
        scaler = InferqAutoscaler(rules, profile.start_s)
    elif case.fleet.endswith("over"):
        by_length = case.fleet.startswith("queue")
        scaler = LagCount(threshold=int(case.setting), least=options.min, most=options.max, with_running=by_length)
    return simulate(trace, simulation, scaler)


def compare(options: argparse.Namespace, console: Console) -> None:
    """Simulate all cases, several at a time, and show what each reaches."""
    compared = cases(options)
    with ProcessPoolExecutor(min(options.processes, len(compared))) as pool:
        found = list(zip(compared, pool.map(simulated, repeat(options), compared), strict=True))
    ours = [one for case, one in found if case.fleet.startswith("inferq")]
    rows = [
        (
            case.name,
            f"{one.attainment * 100:.1f}",
            f"{one.gpu_hours:.2f}",
            f"{one.goodput:,.0f}",
            f"{one.ttft_p99_s:.2f}",
            f"{one.peak_workers}",
            "" if one in ours else beside(one, ours),
        )
        for case, one in found
    ]
    heads = ("fleet", "SLO %", "GPU hours", "good/GPU-h", "TTFT p99, s", "most workers", "beside inferq's")
    title = f"{Path(options.trace).name}, {options.copies} copies, {ENGINE}, {found[0][1].requests:,} requests"
    Sheet(title, heads, rows).printed(console)
    if options.plot is not None:
        series: dict[str, list[Summary]] = defaultdict(list)
        for case, one in found:
            series[case.fleet].append(one)
        draw(series, title, options.plot)


def beside(one: Summary, ours: Sequence[Summary]) -> str:
    """Whether one of ``ours`` meets as many objectives for as little, or the other way round."""
    if any(own.attainment >= one.attainment and own.gpu_hours <= one.gpu_hours for own in ours):
        return "worse"
    if any(own.attainment <= one.attainment and own.gpu_hours >= one.gpu_hours for own in ours):
        return "better"
    return "more met, for more" if one.gpu_hours > ours[0].gpu_hours else "less met, for less"


@dataclass(slots=True)
class Burst:
    """What became of a burst: requests, those that failed, and seconds from its beginning until each event."""

    requests: int
    failures: list[str] = field(default_factory=list)
    most_workers: int = 0
    first_answer_s: float = 0.0
    all_answered_s: float = 0.0
    none_left_s: float = 0.0


@asynccontextmanager
async def scaled_pool(folder: Path) -> AsyncIterator[str]:
    """Queue, Manager, Router and an autoscaler whose workers have simulated engines: the Router's URL, once the model
    is listed, with no worker."""
    async with queue_and_manager(folder) as (queue, _, manager_url):
        url, log = f"http://127.0.0.1:{free_port()}", folder / "router.log"
        quiet = ("--log-level", "warning")
        router = ("--port", url.rpartition(":")[2], "--manager-url", manager_url, "--redis-url", queue.url, *quiet)
        rules = {
            "pool": MODEL,
            "max": _MAX_WORKERS,
            "worker-slots": _SLOTS,
            "scale-in-after": "3s",
            "interval-ms": 200,
            "port": free_port(),
            "manager-url": url,
            "data-dir": folder / "workers",
            "stop-timeout": "10s",
            "log-level": "warning",
        }
        worker = (
            *("--engine", "sim", "--slots", str(_SLOTS), "--sim-mode", "echo", "--sim-ttft-ms", "400"),
            *("--redis-url", queue.url, *quiet),
        )
        flags = [part for flag, value in rules.items() for part in (f"--{flag}", str(value))]
        autoscale = ("autoscale", *flags, "--drain-on-exit", "--", *worker)
        async with running("router.service", router, log):
            await until_answers(f"{url}/readyz", log)
            async with running("inferq", autoscale, folder / "autoscaler.log"):
                await until_answers(f"{url}/v1/models", folder / "autoscaler.log", wanted=f'"{MODEL}"')
                yield url


async def burst(url: str, requests: int) -> Burst:
    """Send ``requests`` at once, and wait until they are answered and no worker is left. Raises ``AssertionError`` if
    that takes longer than it may."""
    found, began = Burst(requests), time.monotonic()
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(number: int) -> None:
            wanted = f"request {number}"
            body = {"model": MODEL, "messages": [{"role": "user", "content": wanted}]}
            try:
                async with session.post("/v1/chat/completions", json=body) as answer:
                    answered: Any = await answer.json()
                    if answer.status != 200 or answered["choices"][0]["message"]["content"] != wanted:
                        found.failures.append(f"{wanted}: {answer.status} {answered}")
            except (aiohttp.ClientError, KeyError, ValueError) as error:
                found.failures.append(f"{wanted}: {error!r}")
            found.first_answer_s = found.first_answer_s or time.monotonic() - began

        async def workers() -> int:
            async with session.get(f"/fabric/v1/pools/{MODEL}") as answer:
                count = int((await answer.json())["workers"])
            found.most_workers = max(found.most_workers, count)
            return count

        async def answered() -> bool:
            await workers()
            return all(task.done() for task in asked)

        async def none_left() -> bool:
            return await workers() == 0

        asked = [asyncio.create_task(ask(number)) for number in range(requests)]
        await eventually(answered, "all requests are answered", limit_s=LIMIT_S, every_s=0.05)
        await asyncio.gather(*asked)
        found.all_answered_s = time.monotonic() - began
        await eventually(none_left, "no worker is left", limit_s=LIMIT_S, every_s=0.1)
        found.none_left_s = time.monotonic() - began
    return found


async def on_a_real_fleet(requests: int) -> Burst:
    """A burst to a pool that has no worker."""
    with tempfile.TemporaryDirectory(prefix="inferq-bench-") as name:
        async with scaled_pool(new_folder(Path(name) / "inferq")) as url:
            return await burst(url, requests)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench."""
    parser = argparse.ArgumentParser(prog="python -m bench.autoscale", description=__doc__)
    parser.add_argument("trace", help="a file or a generator, as inferq simulate takes it")
    parser.add_argument("--copies", type=int, default=20, help="how many times as many requests")
    parser.add_argument("--limit", type=int, default=None, help="first requests of the trace only")
    parser.add_argument("--min", type=int, default=4, help="fewest workers of a fleet that scales")
    parser.add_argument("--max", type=int, default=40)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--max-slots", type=int, default=256)
    parser.add_argument("--target-wait-ms", type=float, nargs="+", default=[2_000.0])
    parser.add_argument("--threshold", type=int, nargs="+", default=[40, 20, 10], help="requests for each worker")
    parser.add_argument("--workers", type=int, nargs="+", default=[6, 7, 8, 9], help="sizes of fixed fleets")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="simulations at a time")
    parser.add_argument("--plot", type=Path, default=None, help="picture to draw, as autoscale.png; needs matplotlib")
    parser.add_argument("--requests", type=int, default=240, help="of the burst")
    parser.add_argument("--skip", choices=("simulation", "fleet"), nargs="*", default=[])
    options = parser.parse_args(argv)
    console = Console(width=140)
    if "simulation" not in options.skip:
        compare(options, console)
    if "fleet" in options.skip:
        return 0
    found = uvloop.run(on_a_real_fleet(options.requests))
    heads = ("requests", "failed", "most workers", "first answer, s", "all answered, s", "no worker left, s")
    seconds = (f"{value:.1f}" for value in (found.first_answer_s, found.all_answered_s, found.none_left_s))
    row = (f"{found.requests}", f"{len(found.failures)}", f"{found.most_workers}", *seconds)
    title = f"Real fleet, process driver, at most {_MAX_WORKERS} workers of {_SLOTS} slots, from none"
    Sheet(title, heads, [row]).printed(console)
    for failure in found.failures[:5]:
        console.print(failure, markup=False)
    return int(bool(found.failures))


if __name__ == "__main__":
    sys.exit(main())
