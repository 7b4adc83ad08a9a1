"""Read the roles' logs: the lines that belong in the history, and counts of events."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from tests.support.clocks import HOUR_S
from tests.support.fleet import Role

from .history import Entry, History

_FLEET_EVENTS = (
    "session_declared_dead",
    "session_reclaimed",
    "session_fenced",
    "manager_acting",
    "engine_failed",
    "queue_connected",
)
_FIELDS = ("attempt", "epoch", "answer", "reason", "error", "delivered", "how", "worker", "session_id", "router")


def lines_of(role: Role) -> Iterator[dict[str, Any]]:
    """The JSON lines of a role's log; other text (tracebacks) is skipped."""
    for text in role.process.log_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line


def add_log_entries(history: History, roles: Sequence[Role]) -> None:
    """Add the log lines about requests and dead workers to ``history``, in order of time."""
    entries: list[Entry] = []
    for role in roles:
        for line in lines_of(role):
            event, request_id = line.get("event", ""), line.get("request_id", "")
            if not request_id and event not in _FLEET_EVENTS:
                continue
            fields = {name: str(line[name])[:200] for name in _FIELDS if name in line and name != "delivered"}
            if "delivered" in line:
                fields["delivered"] = line["delivered"]
            entries.append(
                {"t": _time_of(line, history), "role": role.name, "event": event, "request_id": request_id} | fields
            )
    for entry in sorted(entries, key=lambda entry: entry["t"]):
        history.add("log", **entry)


def count(roles: Sequence[Role]) -> Counter[str]:
    """Counts of events in the whole run."""
    counts: Counter[str] = Counter()
    for role in roles:
        for line in lines_of(role):
            event = line.get("event")
            counts["declared dead"] += event == "session_fenced"
            counts["jobs crashed"] += event == "job_crashed"
    return counts


def shows_canary(role: Role) -> bool:
    """Whether a role's log contains a tenant's secret."""
    return "canary." in role.process.log_text()


def session_of(router: Role) -> str:
    """The session id of a running Router on the queue; empty if it was never connected."""
    return next(
        (str(line["router"]) for line in reversed(list(lines_of(router))) if line.get("event") == "queue_connected"), ""
    )


def _time_of(line: dict[str, Any], history: History) -> float:
    """Seconds since the run began; wrong clocks are off by whole hours."""
    at = datetime.fromisoformat(line["time"]).timestamp() - history.began_at
    return round(at - HOUR_S * round(at / HOUR_S), 4) if abs(at) > HOUR_S / 2 else round(at, 4)
