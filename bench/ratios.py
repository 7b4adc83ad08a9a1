"""Compare systems that carry the same loads: windows taken in turns, and a table of ratios to the first system."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from .systems import System
from .windows import SCENARIOS, Measurement, Scenario, measured

LOADS = tuple(one for one in SCENARIOS if one.name in ("1 client", "64 clients", "32 streams"))

Read = Callable[[Measurement, Scenario], float]
METRICS: tuple[tuple[str, str, Read], ...] = (
    ("1 client", "p50 ms", lambda m, _: m.load.latency_us["p50"] / 1e3),
    ("64 clients", "requests/s", lambda m, _: m.requests_per_s),
    ("64 clients", "CPU us/request", lambda m, _: m.cpu_us),
    ("32 streams", "added TTFT p50 ms", lambda m, s: (m.load.first_us["p50"] - s.delay_us) / 1e3),
    ("32 streams", "gap p99 ms", lambda m, _: m.load.gap_us["p99"] / 1e3),
    ("32 streams", "CPU us/token", lambda m, _: m.cpu_us),
    ("256 streams", "CPU us/token", lambda m, _: m.cpu_us),
)


async def windows_in_turns(
    systems: Sequence[System], loads: Sequence[Scenario], rounds: int, console: Console
) -> list[Measurement]:
    """Each load on each system in each round, another system first each time."""
    found = []
    for number in range(rounds):
        for scenario in loads:
            first = number % len(systems)
            for system in (*systems[first:], *systems[:first]):
                one = await measured(scenario, system, number)
                found.append(one)
                console.print(
                    f"round {number + 1}  {scenario.name:12} {system.name:8} {one.requests_per_s:9,.1f}/s"
                    f"  foreign {one.foreign:.2f}"
                )
    return found


def ratio_table(found: Sequence[Measurement], loads: Sequence[Scenario], names: Sequence[str]) -> Table:
    """Medians over the rounds; in brackets the median ratio to the first of ``names`` within a round."""
    base, *others = names
    by_name = {scenario.name: scenario for scenario in loads}
    table = Table("load", "metric", *names)
    for scenario_name, metric, read in METRICS:
        scenario = by_name.get(scenario_name)
        if scenario is None:
            continue
        rounds = {
            name: [read(m, scenario) for m in found if (m.scenario, m.system) == (scenario_name, name)]
            for name in names
        }
        cells = [f"{statistics.median(rounds[base]):,.2f}"]
        for name in others:
            ratio = statistics.median(mine / theirs for mine, theirs in zip(rounds[name], rounds[base], strict=True))
            cells.append(f"{statistics.median(rounds[name]):,.2f} ({ratio:.2f})")
        table.add_row(scenario_name, metric, *cells)
    return table
