"""Record what happened during a run: one JSON object per line, in order of time. Checks read nothing else.

``request`` is one request as its client saw it; ``fault`` and ``healed`` are the start and the end of an injected
fault; ``recovery`` is the time from a fault on a worker until one of its jobs began elsewhere; ``log`` is a line of a
role's log that names a request or a dead worker. The others describe the queue after the run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

What = Literal["request", "fault", "healed", "recovery", "log", "final", "dead_letter", "counts", "canaries"]

Entry = dict[str, Any]


@dataclass(slots=True)
class Request:
    """One request and what its client saw. Times are seconds since the run began.

    ``end`` is how it ended: ``answered``, ``error`` (an error object, as answer or event; ``code`` is its code),
    ``cut`` (the connection broke), ``left`` (the client disconnected on purpose) or ``silent`` (its time limit passed).
    ``first_byte_s`` is when the answer began, 0 if it did not. ``tries`` are the other tries under its ``key``, earlier
    or at the same time; ``reused`` is the status of another body under that key, 0 if none was sent.
    """

    number: int
    kind: str
    router: int
    cells: int
    sent_s: float
    tenant: str = ""
    deadline_s: float = 0.0
    on_loss: str = ""
    end: str = "silent"
    first_byte_s: float = 0.0
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
    vector: list[float] = field(default_factory=list)
    request_id: str = ""
    key: str = ""
    tries: list[Entry] = field(default_factory=list)
    reused: int = 0

    @property
    def streams(self) -> bool:
        """Whether its answer is a stream."""
        return "stream" in self.kind or self.kind in ("leaver", "hurried")


class History:
    """Appends entries to ``file`` and keeps them."""

    def __init__(self, file: Path) -> None:
        self.entries: list[Entry] = []
        self.begun = time.monotonic()
        self.began_at = time.time()
        self._file = file.open("w")

    def begin(self) -> None:
        """Set the origin of time to now."""
        self.begun, self.began_at = time.monotonic(), time.time()

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.begun

    def add(self, what: What, **fields: Any) -> None:
        """Add an entry, dated now unless ``t`` is given."""
        entry = {"t": round(self.now_s, 4), "what": what, **fields}
        self.entries.append(entry)
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def add_request(self, request: Request) -> None:
        self.add("request", **asdict(request))

    def close(self) -> None:
        self._file.close()


def requests_of(entries: Iterable[Entry]) -> list[Request]:
    """The requests of a history."""
    return [
        Request(**{name: value for name, value in entry.items() if name not in ("t", "what")})
        for entry in entries
        if entry["what"] == "request"
    ]
