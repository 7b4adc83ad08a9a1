"""What the roles said: lines of their logs that belong into the history, and figures counted from them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from tests.support.clocks import HOUR_S
from tests.support.fleet import Role

from .history import Entry, History

_OF_THE_FLEET = (
    "session_declared_dead",
    "session_reclaimed",
    "session_fenced",
    "acting",
    "engine_failed",
    "queue_connected",
)
_TOLD = ("attempt", "epoch", "answer", "reason", "error", "delivered", "how", "worker", "session_id", "router")


def lines_of(role: Role) -> Iterator[dict[str, Any]]:
    """The JSON lines of a role's log; what else is in it (tracebacks) is passed over."""
    for line in role.process.log_text().splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict):
            yield said


def add_said(history: History, roles: Sequence[Role]) -> None:
    """Add to ``history`` what was said of requests and of deaths, in order of time."""
    entries: list[Entry] = []
    for role in roles:
        for said in lines_of(role):
            event, request_id = said.get("event", ""), said.get("request_id", "")
            if not request_id and event not in _OF_THE_FLEET:
                continue
            told = {name: str(said[name])[:200] for name in _TOLD if name in said and name != "delivered"}
            if "delivered" in said:
                told["delivered"] = said["delivered"]
            entries.append(
                {"t": _time_of(said, history), "role": role.name, "event": event, "request_id": request_id} | told
            )
    for entry in sorted(entries, key=lambda entry: entry["t"]):
        history.add("said", **entry)


def count(roles: Sequence[Role]) -> Counter[str]:
    """QueueStats of the whole run."""
    counts: Counter[str] = Counter()
    for role in roles:
        for said in lines_of(role):
            event = said.get("event")
            counts["declared dead"] += event == "session_fenced"
            counts["jobs crashed"] += event == "job_crashed"
    return counts


def shows_canary(role: Role) -> bool:
    """Whether a tenant's secret stands anywhere in a role's log."""
    return "canary." in role.process.log_text()


def session_of(router: Role) -> str:
    """What a Router's present run is called on the queue; empty if it was never connected."""
    return next(
        (str(said["router"]) for said in reversed(list(lines_of(router))) if said.get("event") == "queue_connected"), ""
    )


def _time_of(said: dict[str, Any], history: History) -> float:
    """Seconds since the run began; a clock that is off is off by whole hours."""
    at = datetime.fromisoformat(said["time"]).timestamp() - history.began_at
    return round(at - HOUR_S * round(at / HOUR_S), 4) if abs(at) > HOUR_S / 2 else round(at, 4)
