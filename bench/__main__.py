"""``make bench``: every figure of docs/performance.md from one run."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import uvloop
from rich.console import Console

from . import peers
from .figures import Run
from .jobs.dialogue import SubmitterFailed
from .jobs.inferq import JobStats, queue_with_worker, server_costs
from .jobs.queues import QUEUES, measured_queue
from .native import CannotCompile
from .processes import DidNotStart, memory_mib
from .report import DOCS, as_json, fill, how_it_was_made, markdown, print_run
from .systems import OPTIONAL_SYSTEMS, SYSTEMS, started_systems
from .windows import SCENARIOS, LoadFailed, Measurement, quiet_window

JOBS, SERVER = "jobs", "server"
MAX_SERVER_ROUNDS = 3
QUICK_SPEED = 3.0
CANNOT_RUN = (CannotCompile, DidNotStart, LoadFailed, SubmitterFailed)


async def _windows(options: argparse.Namespace, folder: Path, run: Run, say: Callable[[str], None]) -> None:
    """All rounds of the scenarios. Each round starts with another system, so that none always runs on a warm machine;
    what is only measured once is in the first round."""
    scenarios = [one for one in SCENARIOS if not options.only or one.name in options.only]
    if not scenarios:
        return
    async with started_systems(folder, options.systems, lambda text: _left_out(run, text, say)) as systems:
        for number in range(options.rounds):
            present = [one for one in systems if number == 0 or one.name not in OPTIONAL_SYSTEMS]
            for scenario in scenarios:
                first = number % len(present)
                for system in (*present[first:], *present[:first]):
                    try:
                        one = await quiet_window(
                            scenario, system, number, speed=options.speed, max_foreign=options.max_foreign
                        )
                    except LoadFailed as error:
                        if system.name not in OPTIONAL_SYSTEMS:
                            raise
                        _left_out(run, f"{system.name} has no figure of {scenario.name}. {error}".strip(), say)
                        continue
                    run.windows.append(one)
                    say(f"round {number + 1}  {scenario.name:18} {_line(one, scenario.per)}")
        for system in systems:
            if system.pids:
                run.memory_mib[system.name] = memory_mib(system.pids.values())


def _line(one: Measurement, per: str) -> str:
    return (
        f"{one.system:11} {one.requests_per_s:9,.1f} req/s {one.tokens_per_s:11,.0f} tok/s  "
        f"p50 {one.load.latency_us['p50'] if one.load.latency_us else 0:11,.0f} us  "
        f"CPU {one.cpu_us:7.1f} us/{per:7}  foreign {one.foreign:.2f}" + (f"  try {one.tries}" if one.tries > 1 else "")
    )


async def _jobs(options: argparse.Namespace, folder: Path, run: Run, say: Callable[[str], None]) -> None:
    async def of_inferq(number: int) -> JobStats:
        async with queue_with_worker(folder / f"jobs-inferq-{number}") as queue:
            return await queue.submit_and_drain(options.jobs, number=number)

    names = ["inferq", *QUEUES]
    for number in range(options.rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            if name not in names:
                continue
            try:
                if name == "inferq":
                    one = await of_inferq(number)
                else:
                    one = await measured_queue(name, folder / f"jobs-{name}-{number}", options.jobs, number)
            except (peers.NotInstalled, SubmitterFailed) as error:
                if name == "inferq":
                    raise
                _left_out(run, f"{name} is left out: {error}", say)
                names.remove(name)
                continue
            run.jobs.append(one)
            say(
                f"round {number + 1}  jobs  {name:11} submit {one.submit_per_s:8,.0f}/s  "
                f"drain {one.drain_per_s:8,.0f}/s"
                f"  CPU {one.cpu_us:6.0f} us/job  foreign {one.foreign:.2f}"
            )


async def _server(options: argparse.Namespace, folder: Path, run: Run, say: Callable[[str], None]) -> None:
    for number in range(min(options.rounds, MAX_SERVER_ROUNDS)):
        costs = await server_costs(folder / f"server-{number}", speed=options.speed, jobs=options.jobs)
        run.server.append(costs)
        shown = ", ".join(f"{name} {cost.commands:.1f} commands {cost.cpu_us:.0f} us" for name, cost in costs.items())
        say(f"round {number + 1}  server  {shown}")


def _left_out(run: Run, text: str, say: Callable[[str], None]) -> None:
    run.left_out.append(text)
    say(text)


async def _all(options: argparse.Namespace, console: Console) -> Run:
    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    run = Run(max_foreign=options.max_foreign)
    with tempfile.TemporaryDirectory(prefix="inferq-bench-") as name:
        folder = Path(name)
        await _windows(options, folder, run, say)
        if not options.only or JOBS in options.only:
            await _jobs(options, folder, run, say)
        if not options.only or SERVER in options.only:
            await _server(options, folder, run, say)
    return run


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="inferq beside other systems, in one run.")
    parser.add_argument("--quick", action="store_true", help="one round of short windows: two minutes, rough figures")
    parser.add_argument("--rounds", type=int, help="default: 5")
    parser.add_argument("--jobs", type=int, help="jobs submitted and drained in a round; default: 5000")
    parser.add_argument(
        "--only", action="append", choices=[*(one.name for one in SCENARIOS), JOBS, SERVER], help="one; repeatable"
    )
    parser.add_argument(
        "--system", action="append", dest="systems", choices=[*SYSTEMS, *OPTIONAL_SYSTEMS], help="one; repeatable"
    )
    parser.add_argument("--litellm", action="store_true", help="measure LiteLLM's proxy too, once")
    parser.add_argument(
        "--max-foreign", type=float, default=0.15, help="cores that the rest of the machine may use within a window"
    )
    parser.add_argument("--out", type=Path, default=Path(".inferq/bench"), help="folder of report.json and report.md")
    parser.add_argument("--docs", action="store_true", help="put the tables into docs/performance.md too")
    options = parser.parse_args(argv)
    options.speed = QUICK_SPEED if options.quick else 1.0
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.jobs = options.jobs or (2000 if options.quick else 5000)
    options.systems = options.systems or [*SYSTEMS, *(OPTIONAL_SYSTEMS if options.litellm else ())]
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options, console = _options(argv), Console(width=140)
    try:
        run = uvloop.run(_all(options, console))
    except CANNOT_RUN as error:
        console.print(f"{error}", style="red", markup=False, highlight=False)
        return 1
    facts = how_it_was_made(options.quick, options.rounds)
    print_run(run, facts, console)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "report.json").write_text(json.dumps({**facts, **as_json(run)}, indent=2) + "\n", "utf-8")
    text = markdown(run, facts)
    (options.out / "report.md").write_text(text, "utf-8")
    console.print(f"written to {options.out}/report.json and report.md")
    if options.docs:
        fill(DOCS, "bench", text)
        console.print(f"written into {DOCS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
