"""Load a fleet for a long time and watch what its memory does. ``python -m bench.soak --minutes 30``.

Streams, plain requests and pauses alternate, so that what a burst leaves behind shows. After each turn the resident
memory of every process, the queue's own figure, the Router's open requests and the jobs that the queue still holds are
noted. The first third warms up; the slope is fitted to the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import redis.asyncio
import uvloop
from rich.console import Console
from rich.table import Table

from .native import CannotCompile
from .processes import DidNotStart, memory_mib
from .systems import System, fake_engine, whole_inferq
from .windows import SCENARIOS, LoadFailed, measured

OUT = Path(".inferq/bench")
STREAM_S, PLAIN_S, PAUSE_S = 20.0, 5.0, 5.0
QUEUE = "queue's data"
LOAD = ("requests", "tokens")

Row = dict[str, float]
"""``minutes``, requests and tokens of the turn, and MiB by process."""


async def _turn(system: System, number: int, speed: float) -> tuple[int, int]:
    """One turn of load: how many requests and tokens."""
    by_name = {scenario.name: scenario for scenario in SCENARIOS}
    streams = replace(by_name["256 streams"], seconds=STREAM_S / speed, warmup_s=1.0)
    plain = replace(by_name["64 clients"], seconds=PLAIN_S / speed, warmup_s=0.5)
    requests = tokens = 0
    for scenario in (streams, plain):
        load = (await measured(scenario, system, number)).load
        requests += load.requests
        tokens += load.tokens
    await asyncio.sleep(PAUSE_S / speed)
    return requests, tokens


async def soak(minutes: float, speed: float, folder: Path, console: Console) -> list[Row]:
    """Load a fleet for ``minutes``; what was seen after each turn."""
    rows: list[Row] = []
    async with (
        fake_engine(folder) as (port, engine_pid),
        whole_inferq(folder, f"http://127.0.0.1:{port}") as (whole, url),
    ):
        system = replace(whole, engine_pid=engine_pid)
        client: Any = redis.asyncio.from_url(url)
        began = time.monotonic()
        while time.monotonic() - began < minutes * 60:
            requests, tokens = await _turn(system, len(rows), speed)
            row: Row = {"minutes": (time.monotonic() - began) / 60, "requests": requests, "tokens": tokens}
            row |= {name: memory_mib([pid]) for name, pid in system.pids.items()}
            row[QUEUE] = (await client.info("memory"))["used_memory"] / (1 << 20)
            rows.append(row)
            shown = ", ".join(f"{name} {value:.1f}" for name, value in row.items() if name not in LOAD)
            console.print(f"{requests:,} requests, {tokens:,} tokens; {shown}", highlight=False, soft_wrap=True)
        await client.aclose()
    return rows


def slope_mib_per_hour(rows: Sequence[Row], name: str) -> float:
    """How fast the memory of ``name`` grew once the first third of the turns was over."""
    late = rows[len(rows) // 3 :]
    if len(late) < 2:
        return 0.0
    return statistics.linear_regression([row["minutes"] for row in late], [row[name] for row in late]).slope * 60


def _print(rows: Sequence[Row], console: Console) -> None:
    names = [name for name in rows[0] if name not in ("minutes", *LOAD)]
    table = Table("MiB", "first", "after a third", "last", "highest", "MiB an hour, last two thirds")
    for name in names:
        seen = [row[name] for row in rows]
        figures = (seen[0], seen[len(seen) // 3], seen[-1], max(seen), slope_mib_per_hour(rows, name))
        table.add_row(name, *(f"{figure:.1f}" for figure in figures))
    console.print(table)
    requests, tokens = (sum(int(row[name]) for row in rows) for name in LOAD)
    console.print(
        f"{requests:,} requests, {tokens:,} tokens of streams and answers, every one checked", highlight=False
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description="A long load, and what memory does.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--speed", type=float, default=1.0, help="divides the length of a turn; default: 1")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of soak.csv")
    options = parser.parse_args(argv)
    console = Console(width=140)
    with tempfile.TemporaryDirectory(prefix="inferq-soak-") as name:
        try:
            rows = uvloop.run(soak(options.minutes, options.speed, Path(name), console))
        except (CannotCompile, DidNotStart, LoadFailed) as error:
            console.print(f"{error}", style="red", markup=False, highlight=False)
            return 1
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "soak.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    _print(rows, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
