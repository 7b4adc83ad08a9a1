"""How inferq's cost grows: with clients, streams, workers, the prompt's size, backlog, tenants and models.

``make bench-growth``, or ``python -m bench.growth``. Writes ``growth.csv``, and a plot where the peers' environment can
be installed.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import uvloop
from rich.console import Console

from . import peers
from .jobs.dialogue import SubmitterFailed
from .jobs.inferq import JobStats, queue_with_worker
from .native import CannotCompile
from .processes import DidNotStart, new_folder
from .report import DOCS, Sheet, fill, how_it_was_made
from .systems import fake_engine, whole_inferq
from .windows import LoadFailed, Measurement, Scenario, quiet_window

OUT = Path(".inferq/bench")
STREAM = {"stream": True, "per": "token", "delay_us": 20_000, "interval_us": 50_000, "tokens": (32, 96)}
WAITING = 5000


@dataclass(frozen=True, slots=True)
class Point:
    """One figure at one value of an axis. ``foreign``: cores that the rest of the machine used meanwhile."""

    axis: str
    value: int
    figure: str
    number: float
    foreign: float


@dataclass(frozen=True, slots=True)
class Axis:
    """What grows: its values, and how the points of one value are measured in a folder of its own."""

    values: Sequence[int]
    points: Callable[[Path, int, float], AsyncIterator[tuple[str, float, float]]]


def _of_window(one: Measurement, per: str) -> list[tuple[str, float, float]]:
    figures = {f"CPU us/{per}": one.cpu_us}
    for name, value in one.cpu_us_of.items():
        role = f"of it {name.partition('-')[0]}"  # worker-2 is a worker
        figures[role] = figures.get(role, 0.0) + value
    if one.load.latency_us and per == "request":
        figures["p50, us"] = one.load.latency_us["p50"]
    return [(name, number, one.foreign) for name, number in figures.items()]


def _of_jobs(one: JobStats) -> list[tuple[str, float, float]]:
    figures = {
        "Redis CPU us/job": one.cpu_us_of["redis"],
        "CPU us/job": one.cpu_us,
        "submit/s": one.submit_per_s,
        "drain/s": one.drain_per_s,
    }
    return [(name, number, one.foreign) for name, number in figures.items()]


async def _load(folder: Path, scenario: Scenario, speed: float, workers: int = 1) -> list[tuple[str, float, float]]:
    async with (
        fake_engine(folder) as (port, _),
        whole_inferq(folder, f"http://127.0.0.1:{port}", workers=workers) as (system, _),
    ):
        return _of_window(await quiet_window(scenario, system, speed=speed, max_foreign=0.15), scenario.per)


async def _clients(folder: Path, value: int, speed: float) -> AsyncIterator[tuple[str, float, float]]:
    for point in await _load(folder, Scenario(name=f"{value} clients", clients=value, seconds=3.0), speed):
        yield point


async def _streams(folder: Path, value: int, speed: float) -> AsyncIterator[tuple[str, float, float]]:
    scenario = Scenario(name=f"{value} streams", clients=value, seconds=4.0, warmup_s=4.0, **STREAM)  # type: ignore[arg-type]
    for point in await _load(folder, scenario, speed):
        yield point


async def _workers(folder: Path, value: int, speed: float) -> AsyncIterator[tuple[str, float, float]]:
    for point in await _load(folder, Scenario(name=f"{value} workers", clients=64, seconds=3.0), speed, value):
        yield point


async def _prompt(folder: Path, value: int, speed: float) -> AsyncIterator[tuple[str, float, float]]:
    scenario = Scenario(name=f"{value} bytes", clients=2, seconds=3.0, prompt_bytes=value)
    for point in await _load(folder, scenario, speed):
        yield point


async def _backlog(folder: Path, value: int, _: float) -> AsyncIterator[tuple[str, float, float]]:
    async with queue_with_worker(folder / "queue") as queue:
        for point in _of_jobs(await queue.submit_and_drain(value, xadd=False)):
            yield point


async def _tenants(folder: Path, value: int, _: float) -> AsyncIterator[tuple[str, float, float]]:
    async with queue_with_worker(folder / "queue") as queue:
        for point in _of_jobs(await queue.submit_and_drain(WAITING, tenants=value, xadd=False)):
            yield point


async def _models(folder: Path, value: int, speed: float) -> AsyncIterator[tuple[str, float, float]]:
    async with queue_with_worker(folder / "queue", models=value) as queue:
        cost = await queue.server_cost(1, max(20, int(300 / speed)), models=value)
        yield "Redis CPU us/job", cost.cpu_us, cost.foreign
        yield "Redis commands/job", cost.commands, cost.foreign


AXES = {
    "clients": Axis((1, 4, 16, 64, 256, 1024), _clients),
    "streams": Axis((8, 32, 128, 256, 512), _streams),
    "workers": Axis((1, 2, 4, 8), _workers),
    "prompt bytes": Axis((1_000, 10_000, 100_000, 1_000_000, 10_000_000), _prompt),
    "jobs waiting": Axis((1_000, 10_000, 100_000), _backlog),
    "tenants": Axis((1, 10, 100, 1_000), _tenants),
    "models": Axis((1, 10, 100, 1_000), _models),
}
"""By name. Backlog and tenants: jobs that wait while the worker sleeps, and are then drained. Models: lone jobs of all
models in turn, on one worker that serves them."""


async def _all(options: argparse.Namespace, say: Callable[[str], None]) -> list[Point]:
    found: list[Point] = []
    with tempfile.TemporaryDirectory(prefix="inferq-bench-") as name:
        for axis_name in options.axes:
            axis = AXES[axis_name]
            values = axis.values[: (len(axis.values) + 1) // 2] if options.quick else axis.values
            for value in values:
                folder = new_folder(Path(name) / f"{axis_name}-{value}".replace(" ", "-"))
                try:
                    points = [
                        Point(axis_name, value, *point)
                        async for point in axis.points(folder, value, 3.0 if options.quick else 1.0)
                    ]
                except (LoadFailed, SubmitterFailed) as error:
                    say(f"{axis_name} {value:,}: FAILED: {error}")
                    continue
                found += points
                shown = "  ".join(f"{point.figure} {point.number:,.1f}" for point in points)
                say(f"{axis_name} {value:,}: {shown}  foreign {max(point.foreign for point in points):.2f}")
    return found


def sheets(points: Sequence[Point]) -> list[Sheet]:
    """A table for each axis: its values down, figures across."""
    found = []
    for axis in dict.fromkeys(point.axis for point in points):
        of_axis = [point for point in points if point.axis == axis]
        figures = list(dict.fromkeys(point.figure for point in of_axis))
        numbers = {(point.value, point.figure): point.number for point in of_axis}
        rows = []
        for value in dict.fromkeys(point.value for point in of_axis):
            cells = [numbers.get((value, figure)) for figure in figures]
            foreign = max(point.foreign for point in of_axis if point.value == value)
            shown = ["" if cell is None else f"{cell:,.1f}" for cell in cells]
            rows.append([f"{value:,}", *shown, f"{foreign:.2f}"])
        found.append(Sheet(f"Cost by {axis}", [axis, *figures, "foreign cores"], rows))
    return found


def write_csv(points: Sequence[Point], path: Path) -> None:
    """A line for each point."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(Point.__slots__)
        rows.writerows(astuple(point) for point in points)


def _plot(table: Path, picture: Path) -> str:
    """Draw ``table`` with the peers' matplotlib. Returns why it was not drawn, empty if it was."""
    try:
        command = [peers.python(), Path(peers.__file__).with_name("plot.py"), table, picture]
    except peers.NotInstalled as error:
        return f"not drawn: {error}"
    done = subprocess.run(command, env=peers.environment(), capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"not drawn: {done.stderr[-500:]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement."""
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description="How inferq's cost grows.")
    parser.add_argument("--axis", action="append", dest="axes", choices=list(AXES), help="one; repeatable")
    parser.add_argument("--quick", action="store_true", help="the smaller half of the values, short windows")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of growth.csv, growth.md and growth.png")
    parser.add_argument("--docs", action="store_true", help="put the tables into docs/performance.md too")
    options = parser.parse_args(argv)
    options.axes = options.axes or list(AXES)
    console = Console(width=160)
    try:
        points = uvloop.run(
            _all(options, lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True))
        )
    except (CannotCompile, DidNotStart) as error:
        console.print(f"{error}", style="red", markup=False, highlight=False)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(points, options.out / "growth.csv")
    tables = sheets(points)
    text = "\n".join(sheet.markdown() for sheet in tables)
    (options.out / "growth.md").write_text(text, "utf-8")
    for sheet in tables:
        sheet.printed(console)
    console.print(f"written to {options.out}/growth.csv and growth.md")
    picture = DOCS.with_name("growth.png") if options.docs else options.out / "growth.png"
    problem = _plot(options.out / "growth.csv", picture)
    console.print(problem or f"drawn in {picture}")
    if options.docs:
        foreign = max((point.foreign for point in points), default=0.0)
        made = how_it_was_made(options.quick) | {"foreign load": f"{foreign:.2f} cores at most"}
        facts = "".join(f"- {name}: {value}\n" for name, value in made.items())
        drawn = "" if problem else f"![Cost by what grows]({picture.name})\n\n"
        fill(DOCS, "growth", f"{facts}\n{drawn}{text}")
        console.print(f"written into {DOCS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
