"""Show a run: a table of its numbers, and the events around each violation."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from .check import INVARIANTS, SCAN_S, Verdict, Violation
from .explanations import INSTANT_S, RELINK_S, spans_of
from .history import Entry
from .plan import LEASE_S

BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"
_HIDDEN_FIELDS = ("ids", "vector", "what")


def rows(verdict: Verdict) -> list[tuple[str, str]]:
    """The numbers, by name."""
    counts = verdict.counts
    explained = ", ".join(f"{count} {why}" for why, count in sorted(verdict.explained.items())) or "none"
    shown = ", ".join(f"{number} {name} ({verdict.exercised[number]})" for number, name in INVARIANTS.items())
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
        ("replies lost after commit", str(counts.get("replies lost", 0))),
        ("attempts recovered", str(counts.get("recovered", 0))),
        ("jobs that yielded", str(counts.get("yielded", 0))),
        ("streams migrated", str(verdict.migrated)),
        ("gaps in them", str(verdict.gaps)),
        ("jobs of crashed engines", str(counts.get("jobs crashed", 0))),
        ("dead letters", str(counts.get("dead", 0))),
        ("SIGKILL of a worker to the next start of its jobs", _times(verdict.kill_to_start_s)),
        (f"hang to the next start (at most {LEASE_S + SCAN_S:g} s)", _times(verdict.hang_to_start_s)),
        ("healed to the next start", _times(verdict.heal_to_start_s)),
        ("client gone to its engine's slot free", _times(verdict.leave_to_abort_s)),
        ("the longest that a request took", f"{verdict.max_s:.1f} s"),
        ("invariants, and how often they could have been broken", shown),
    ]


def _times(seconds: Sequence[float]) -> str:
    if not seconds:
        return "not measured"
    return f"p50 {statistics.median(seconds):.2f} s, max {max(seconds):.2f} s ({len(seconds)})"


def table(verdict: Verdict, title: str) -> str:
    """A Markdown table."""
    return "\n".join((f"| {title} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows(verdict))))


def commit() -> str:
    """The current commit, marked if files differ from it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def write_into(page: Path, verdict: Verdict, title: str) -> None:
    """Put the table between the marks of a page."""
    text = page.read_text("utf-8")
    before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
    page.write_text(f"{text[:before]}\n\n{table(verdict, title)}\n\n{text[after:]}", "utf-8")


def describe_violations(verdict: Verdict, entries: Sequence[Entry], max_shown: int = 5) -> str:
    """Each violation with its request, the faults at that time and the log lines about the request."""
    parts = []
    for violation in verdict.violations[:max_shown]:
        parts += [f"VIOLATION {violation}", *(f"    {line}" for line in _concerning(violation, entries))]
    if len(verdict.violations) > max_shown:
        parts.append(f"... and {len(verdict.violations) - max_shown} more")
    return "\n".join(parts)


def _concerning(violation: Violation, entries: Sequence[Entry]) -> Iterator[str]:
    request = violation.request
    if request is None:
        return
    beside = {
        span.number
        for span in spans_of(entries)
        if span.meets(request.sent_s - INSTANT_S, request.ended_s + INSTANT_S, RELINK_S)
    }
    found = []
    for entry in entries:
        fault = entry["what"] in ("fault", "healed") and entry["number"] in beside
        own = entry["what"] == "request" and entry["number"] == request.number
        about = entry["what"] in ("log", "dead_letter") and entry["request_id"] == request.request_id
        if fault or own or about:
            found.append(entry)
    for entry in sorted(found, key=lambda entry: float(entry["t"])):
        fields = {
            name: value for name, value in entry.items() if name not in _HIDDEN_FIELDS and value not in ("", [], {})
        }
        yield f"{entry['what']}: {fields}"
