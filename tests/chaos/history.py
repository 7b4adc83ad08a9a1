"""What was seen during a run: one JSON object per line, in order of time. Checks read nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

What = Literal["request", "fault", "healed", "recovery", "final", "counts"]


@dataclass(slots=True)
class Request:
    """One request and what its client saw. Times are seconds since the run began.

    ``end`` is how it ended: ``answered``, ``error`` (an error object, as answer or event; ``code`` is its code),
    ``cut`` (the connection broke), ``left`` (the client went on purpose) or ``silent`` (its limit passed).
    """

    number: int
    kind: str
    router: int
    cells: int
    begun_s: float
    end: str = "silent"
    ended_s: float = 0.0
    status: int = 0
    code: str = ""
    message: str = ""
    text: str = ""
    ids: list[str] = field(default_factory=list)
    roles: int = 0
    finishes: list[str] = field(default_factory=list)
    done: int = 0
    usage: dict[str, int] = field(default_factory=dict)
    usages: int = 0
    request_id: str = ""


class History:
    """Appends entries to ``file`` and keeps them."""

    def __init__(self, file: Path) -> None:
        self.entries: list[dict[str, Any]] = []
        self.begun = time.monotonic()
        self._file = file.open("w")

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.begun

    def add(self, what: What, **fields: Any) -> None:
        entry = {"t": round(self.now_s, 4), "what": what, **fields}
        self.entries.append(entry)
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def add_request(self, request: Request) -> None:
        self.add("request", **asdict(request))

    def close(self) -> None:
        self._file.close()


def requests_of(entries: Iterable[dict[str, Any]]) -> list[Request]:
    """The requests of a history."""
    return [
        Request(**{name: value for name, value in entry.items() if name not in ("t", "what")})
        for entry in entries
        if entry["what"] == "request"
    ]
