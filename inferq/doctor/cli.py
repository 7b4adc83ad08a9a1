"""``inferq doctor``: what is wrong, and how to fix it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from inferq.console import err, out, print_json
from inferq.doctor import DoctorTarget, Finding, Level, examine
from inferq.doctor.queue import repair_queue
from inferq.tables import UNLIMITED, output_width, print_whole


def show_findings(findings: Sequence[Finding], *, as_json: bool) -> int:
    """Print them; the exit code: 1 if a check failed."""
    worst = any(finding.level is Level.FAILURE for finding in findings)
    if as_json:
        print_json({"ok": not worst, "findings": [asdict(finding) for finding in findings]})
        return int(worst)
    marks = {Level.OK: "[green]ok[/green]", Level.WARNING: "[yellow]warn[/yellow]", Level.FAILURE: "[red]fail[/red]"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in findings:
        text = escape(finding.text) + (f"\n[dim]-> {escape(finding.fix)}[/dim]" if finding.fix else "")
        table.add_row(marks[finding.level], finding.check, text)
    if output_width() == UNLIMITED:
        print_whole(table)
    else:
        out.print(table)
    return int(worst)


def repair(data_dir: Path) -> None:
    """Mend the embedded queue's data, and say what was done. Raises ``CannotStart``."""
    err.print(escape(repair_queue(data_dir)))


__all__ = ["DoctorTarget", "examine", "repair", "show_findings"]
