"""``make bench``: every metric of docs/performance.md from one run."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import uvloop
from rich.console import Console

from .job_queue import JobStats, measured_jobs
from .processes import new_folder
from .report import SYSTEMS, print_summary, summary
from .scenarios import SCENARIO_GROUPS, Measurement, ScenarioGroup, measured
from .systems import started_systems


async def _run_group(
    group: ScenarioGroup, options: argparse.Namespace, folder: Path, console: Console
) -> list[Measurement]:
    """All rounds of a group. Each round starts with another system, so that none always runs on a warm machine."""
    found = []
    async with started_systems(new_folder(folder), group.engine_options, options.systems) as systems:
        for number in range(options.rounds):
            for scenario in group.scenarios:
                first = number % len(systems)
                for system in (*systems[first:], *systems[:first]):
                    one = await measured(scenario, system, number, options.seconds)
                    found.append(one)
                    console.print(
                        f"round {number + 1}  {scenario.name:12} {system.name:8} {one.load.rate:9,.1f}/s "
                        f"p50 {one.load.latency_ms['p50']:9.3f} ms  CPU {one.cpu_us:8.1f} us/{scenario.per}"
                    )
    return found


async def _all(options: argparse.Namespace, console: Console) -> None:
    measurements: list[Measurement] = []
    jobs: list[JobStats] = []
    with tempfile.TemporaryDirectory(prefix="inferq-bench-") as name:
        folder = Path(name)
        for number, group in enumerate(SCENARIO_GROUPS):
            scenarios = tuple(s for s in group.scenarios if not options.only or s.name in options.only)
            if scenarios:
                chosen = ScenarioGroup(engine_options=group.engine_options, scenarios=scenarios)
                measurements += await _run_group(chosen, options, folder / f"group-{number}", console)
        if not options.only or "jobs" in options.only:
            for number in range(options.rounds):
                jobs.append(await measured_jobs(folder / f"jobs-{number}", options.jobs))
                one = jobs[-1]
                console.print(
                    f"round {number + 1}  jobs: XADD {one.xadd_per_s:,.0f}/s  submit {one.submit_per_s:,.0f}/s  "
                    f"drain {one.drain_per_s:,.0f}/s  CPU {one.cpu_us:.0f} us/job"
                )
    result = summary(measurements, jobs)
    print_summary(result, console)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"written to {options.json}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    names = [scenario.name for group in SCENARIO_GROUPS for scenario in group.scenarios] + ["jobs"]
    parser = argparse.ArgumentParser(prog="python -m bench", description="inferq beside the engine alone and a proxy.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, help="length of each load; each scenario has its own")
    parser.add_argument("--jobs", type=int, default=5000, help="jobs submitted and drained in a round")
    parser.add_argument("--only", action="append", choices=names, help="one scenario; may be repeated")
    parser.add_argument("--system", action="append", dest="systems", choices=SYSTEMS, help="one system; repeatable")
    parser.add_argument("--json", type=Path, default=Path(".inferq/bench.json"), help="where the metrics are written")
    options = parser.parse_args(argv)
    options.systems = options.systems or list(SYSTEMS)
    uvloop.run(_all(options, Console(width=120)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
