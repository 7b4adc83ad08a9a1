"""The table of a run, and what was wrong in it."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .check import Verdict

BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"
AROUND_S = 3.0
"""How far from a request an event may be and still belong to its story."""


def rows(verdict: Verdict) -> list[tuple[str, str]]:
    """The figures, by name."""
    counts = verdict.counts
    explained = ", ".join(f"{count} {why}" for why, count in sorted(verdict.explained.items())) or "none"
    return [
        ("requests", str(verdict.requests)),
        ("acknowledged", str(verdict.acknowledged)),
        ("completed", str(verdict.completed)),
        ("**lost**", f"**{verdict.lost}**"),
        ("**duplicated**", f"**{verdict.duplicated}**"),
        ("**spliced**", f"**{verdict.spliced}**"),
        ("not answered, with a reason", explained),
        ("faults injected", str(verdict.faults)),
        ("FENCED", str(counts.get("fenced", 0))),
        ("DUPLICATE", str(counts.get("duplicate", 0))),
        ("attempts recovered", str(counts.get("recovered", 0))),
        ("streams migrated, gaps", f"{counts.get('streams continued', 0)}, 0" if not verdict.spliced else "see above"),
        ("jobs of crashed engines", str(counts.get("jobs crashed", 0))),
        ("SIGKILL of a worker to the next start of its jobs", _times(verdict.kill_to_start_s)),
        ("hang to the next start", _times(verdict.hang_to_start_s)),
    ]


def _times(seconds: Sequence[float]) -> str:
    if not seconds:
        return "not seen"
    return f"p50 {statistics.median(seconds):.2f} s, max {max(seconds):.2f} s ({len(seconds)})"


def table(verdict: Verdict, title: str) -> str:
    """A Markdown table."""
    return "\n".join((f"| {title} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows(verdict))))


def commit() -> str:
    """The commit at hand, with a mark if files differ from it."""
    told = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"


def write_into(page: Path, verdict: Verdict, title: str) -> None:
    """Put the table between the marks of a page."""
    text = page.read_text("utf-8")
    before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
    page.write_text(f"{text[:before]}\n{table(verdict, title)}\n{text[after:]}", "utf-8")


def story(verdict: Verdict, entries: Sequence[dict[str, Any]], most: int = 5) -> str:
    """Each violation with what happened around it."""
    parts = []
    for violation in verdict.violations[:most]:
        parts.append(f"VIOLATION {violation}")
        request = violation.request
        if request is None:
            continue
        for entry in entries:
            near = request.begun_s - AROUND_S <= entry["t"] <= request.ended_s + AROUND_S
            mine = entry["what"] == "request" and entry["number"] == request.number
            if mine or (near and entry["what"] in ("fault", "healed")):
                told = {key: value for key, value in entry.items() if key not in ("ids",)}
                parts.append(f"    {told}")
    if len(verdict.violations) > most:
        parts.append(f"... and {len(verdict.violations) - most} more")
    return "\n".join(parts)
