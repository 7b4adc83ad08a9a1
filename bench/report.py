"""Summarize several rounds: medians and ratios, as a table and as JSON."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from .job_queue import JobStats
from .scenarios import SCENARIO_GROUPS, Measurement, Scenario

SYSTEMS = ("direct", "proxy", "inferq")


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of the table: how it is read off a measurement, and the aim as a ratio to the proxy."""

    name: str
    unit: str
    scenario: str
    read: Callable[[Measurement, Scenario], float]
    aim: str = ""


def _p50(measurement: Measurement, _: Scenario) -> float:
    return measurement.load.latency_ms["p50"] * 1e3


def _rate(measurement: Measurement, _: Scenario) -> float:
    return measurement.load.rate


def _cpu(measurement: Measurement, _: Scenario) -> float:
    return measurement.cpu_us


def _added_ttft(measurement: Measurement, scenario: Scenario) -> float:
    return measurement.load.first_ms["p50"] - scenario.ttft_ms


METRICS = (
    Metric("p50, 1 client", "us", "1 client", _p50, "<= 1.5"),
    Metric("CPU per request, 1 client", "us", "1 client", _cpu),
    Metric("requests a second, 64 clients", "1/s", "64 clients", _rate),
    Metric("CPU per request, 64 clients", "us", "64 clients", _cpu, "<= 1.0"),
    Metric("added TTFT p50, 32 streams", "ms", "32 streams", _added_ttft, "<= 1.0"),
    Metric("CPU per token, 32 streams", "us", "32 streams", _cpu, "<= 1.0"),
    Metric("added TTFT p50, 256 streams", "ms", "256 streams", _added_ttft),
    Metric("CPU per token, 256 streams", "us", "256 streams", _cpu, "< 1.0"),
)


def summary(measurements: Sequence[Measurement], jobs: Sequence[JobStats]) -> dict[str, Any]:
    """Medians over the rounds, the ratios of inferq to the proxy, and the machine."""
    scenarios = {scenario.name: scenario for group in SCENARIO_GROUPS for scenario in group.scenarios}
    lines = []
    for metric in METRICS:
        rounds: dict[str, dict[int, float]] = {}
        for one in measurements:
            if one.scenario == metric.scenario:
                rounds.setdefault(one.system, {})[one.number] = metric.read(one, scenarios[one.scenario])
        if rounds:
            medians = {system: statistics.median(values.values()) for system, values in rounds.items()}
            ratio = _ratio(rounds.get("inferq", {}), rounds.get("proxy", {}))
            lines.append({"metric": metric.name, "unit": metric.unit, **medians, "ratio": ratio, "aim": metric.aim})
    return {
        "machine": machine(),
        "rounds": 1 + max((one.number for one in measurements), default=len(jobs) - 1),
        "metrics": lines,
        "cpu_us_of": _by_process(measurements),
        "jobs": _jobs(jobs),
    }


def machine() -> dict[str, Any]:
    """The machine that this ran on."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": [round(value, 1) for value in os.getloadavg()],
    }


def print_summary(result: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(title="Medians over the rounds; the ratio is inferq / proxy within a round")
    for column in ("metric", "unit", *SYSTEMS, "ratio", "aim"):
        table.add_column(column, justify="left" if column in ("metric", "unit") else "right")
    for line in result["metrics"]:
        ratio = "" if line["ratio"] is None else f"{line['ratio']:.2f}"
        values = (f"{line[system]:,.1f}" if system in line else "" for system in SYSTEMS)
        table.add_row(line["metric"], line["unit"], *values, ratio, line["aim"])
    console.print(table)
    for scenario, by_process in result["cpu_us_of"].items():
        parts = ", ".join(f"{name} {value:.0f}" for name, value in by_process.items())
        console.print(f"inferq's CPU, {scenario}: {parts} us")
    if jobs := result["jobs"]:
        console.print(
            f"jobs: submit {jobs['submit_per_s']:,.0f}/s = {jobs['submit_ratio']:.2f} x pipelined XADD (aim >= 0.5), "
            f"drain {jobs['drain_per_s']:,.0f}/s = {jobs['drain_ratio']:.3f} x, {jobs['cpu_us']:.0f} us CPU each"
        )


def _ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float | None:
    """The median of the ratios of single rounds: other load in a round slows both sides."""
    both = ours.keys() & theirs.keys()
    return statistics.median(ours[number] / theirs[number] for number in both) if both else None


def _by_process(measurements: Sequence[Measurement]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for scenario in dict.fromkeys(measurement.scenario for measurement in measurements):
        rounds = [m.cpu_us_of for m in measurements if (m.system, m.scenario) == ("inferq", scenario)]
        if rounds:
            found[scenario] = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    return found


def _jobs(jobs: Sequence[JobStats]) -> dict[str, Any] | None:
    if not jobs:
        return None
    return {
        "xadd_per_s": statistics.median(one.xadd_per_s for one in jobs),
        "submit_per_s": statistics.median(one.submit_per_s for one in jobs),
        "drain_per_s": statistics.median(one.drain_per_s for one in jobs),
        "submit_ratio": statistics.median(one.submit_per_s / one.xadd_per_s for one in jobs),
        "drain_ratio": statistics.median(one.drain_per_s / one.xadd_per_s for one in jobs),
        "cpu_us": statistics.median(one.cpu_us for one in jobs),
        "cpu_us_of": {name: statistics.median(one.cpu_us_of[name] for one in jobs) for name in jobs[0].cpu_us_of},
    }
