"""Show a run: as tables for a terminal, as the same tables in Markdown, and as JSON."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .figures import BASE, FIGURES, Run, Spread, aims, machine
from .processes import ROOT

DOCS = ROOT / "docs" / "performance.md"


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return f"### {self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def printed(self, console: Console) -> None:
        table = Table(title=self.title, title_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


def sheets(run: Run) -> list[Sheet]:
    """Every table that the run has values for."""
    found = [_systems(run), _aims(run), _hops(run), _queues(run), _server(run)]
    return [sheet for sheet in found if sheet.rows]


def notes(run: Run) -> list[str]:
    """What a reader must know of the run."""
    lines = []
    if run.windows:
        foreign = [one.foreign for one in run.windows]
        loud = sum(value > run.max_foreign for value in foreign)
        again = sum(one.tries > 1 for one in run.windows)
        lines.append(
            f"Everything else on the machine used {statistics.median(foreign):.2f} cores in the median window, "
            f"{max(foreign):.2f} in the loudest. {again} of {len(foreign)} windows were repeated; {loud} stayed above "
            f"{run.max_foreign:g}" + (": their figures are not to be trusted." if loud else ".")
        )
    if through := [one for one in run.windows if one.cpu_us_of]:
        engine, generator = (max(getattr(one, name) for one in through) for name in ("engine", "generator"))
        lines.append(
            f"Behind a system, the engine used {engine:.2f} cores at most, the load generator {generator:.2f}."
        )
    return [*lines, *run.left_out]


def as_json(run: Run) -> dict[str, Any]:
    """Everything, each window included."""
    return {
        "load_average": machine()["load_average"],
        "notes": notes(run),
        "figures": [
            {
                "name": figure.name,
                **{system: _plain(run.figure(figure, system)) for system in run.systems()},
                "ratio": _plain(run.ratio(figure)),
            }
            for figure in FIGURES
        ],
        "aims": [{**asdict(aim), "met": aim.met} for aim in aims(run)],
        "memory_mib": run.memory_mib,
        "jobs": [asdict(one) for one in run.jobs],
        "server": [{name: asdict(cost) for name, cost in one.items()} for one in run.server],
        "windows": [asdict(one) for one in run.windows],
    }


def _plain(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else asdict(spread)


def _systems(run: Run) -> Sheet:
    names = run.systems()
    rows = []
    for figure in FIGURES:
        found = [run.figure(figure, name) for name in names]
        if any(found):
            cells = ["" if one is None else f"{one.median:,.{figure.digits}f}" for one in found]
            rows.append([figure.name, *cells, _ratio(run.ratio(figure))])
    if run.memory_mib:
        cells = [f"{run.memory_mib[name]:,.0f}" if name in run.memory_mib else "" for name in names]
        ours, base = run.memory_mib.get("inferq"), run.memory_mib.get(BASE)
        rows.append(["memory, MiB (all processes)", *cells, f"{ours / base:.2f}" if ours and base else ""])
    title = f"Systems: medians over the rounds; ratio of inferq to {BASE} within a round (lowest to highest)"
    return Sheet(title, ["figure", *names, f"inferq / {BASE}"], rows)


def _aims(run: Run) -> Sheet:
    rows = []
    for aim in aims(run):
        if aim.met is not None:
            limit = f"{'>=' if aim.at_least else '<='} {aim.limit:g}"
            rows.append([aim.name, _ratio(aim.found), limit, "yes" if aim.met else "NO", aim.stretch])
    return Sheet("The aim", ["figure", "found", "aim", "met", "stretch"], rows)


def _hops(run: Run) -> Sheet:
    """inferq's CPU time by process."""
    names: list[str] = []
    rows = []
    for scenario in dict.fromkeys(one.scenario for one in run.windows):
        rounds = [one.cpu_us_of for one in run.windows if (one.system, one.scenario) == ("inferq", scenario)]
        if rounds:
            names = list(rounds[0])
            rows.append([scenario, *(f"{statistics.median(one[name] for one in rounds):.1f}" for name in names)])
    return Sheet("Where inferq's CPU goes, us per request or token", ["scenario", *names], rows)


def _queues(run: Run) -> Sheet:
    rows = []
    for name in dict.fromkeys(one.name for one in run.jobs):
        found = run.jobs_of(name)
        submit = statistics.median(one.submit_per_s for one in found)
        drain = statistics.median(one.drain_per_s for one in found)
        rows.append([name, f"{submit:,.0f}", f"{drain:,.0f}", f"{statistics.median(one.cpu_us for one in found):,.0f}"])
    xadd = [one.xadd_per_s for one in run.jobs if one.xadd_per_s]
    if xadd:
        rows.insert(0, ["redis-py, pipelined XADD", f"{statistics.median(xadd):,.0f}", "", ""])
    return Sheet("Job queues", ["queue", "submit/s", "drain/s", "CPU us/job"], rows)


def _server(run: Run) -> Sheet:
    rows = []
    for name in run.server[0] if run.server else ():
        commands = statistics.median(one[name].commands for one in run.server)
        cpu = statistics.median(one[name].cpu_us for one in run.server)
        rows.append([name, f"{commands:.1f}" if commands else "", f"{cpu:.0f}"])
    return Sheet("What a job costs the queue's server", ["job", "commands", "CPU us"], rows)


def _ratio(spread: Spread | None) -> str:
    if spread is None:
        return ""
    digits = 2 if spread.median < 10 else 1
    if spread.low == spread.high:
        return f"{spread.median:.{digits}f}"
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f} to {spread.high:.{digits}f})"


def print_run(run: Run, facts: Mapping[str, str], console: Console) -> None:
    """Print the tables and the notes."""
    for sheet in sheets(run):
        sheet.printed(console)
    for note in (", ".join(f"{name} {value}" for name, value in facts.items()), *notes(run)):
        console.print(note, highlight=False, markup=False)


def how_it_was_made(quick: bool, rounds: int = 1) -> dict[str, str]:
    """When, of which commit, with how many rounds, on what."""
    here = machine()
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return {
        "date": f"{datetime.now(UTC):%d %B %Y %H:%M} UTC",
        "commit": described.stdout.strip() or "unknown",
        "rounds": f"{rounds}{', short windows' if quick else ''}",
        "machine": f"{here['cores']} cores, {here['system']}, Python {here['python']}",
    }


def fill(document: Path, name: str, text: str) -> None:
    """Put ``text`` between the comments ``<!-- name -->`` and ``<!-- /name -->`` of a document, for what was there."""
    before, begin, rest = document.read_text("utf-8").partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not begin or not end:
        raise ValueError(f"{document} has no place for {name}")
    document.write_text(f"{before}{begin}\n{text.strip()}\n\n{end}{after}", "utf-8")


def markdown(run: Run, facts: Mapping[str, str]) -> str:
    """The tables and the notes, for docs/performance.md. ``facts``: how the run was made."""
    said = [f"- {name}: {value}" for name, value in facts.items()] + [f"- {note}" for note in notes(run)]
    return "\n".join(["\n".join(said) + "\n", *(sheet.markdown() for sheet in sheets(run))])
