"""Kept jobs: what is kept of a stored job beside its answer, what may be told of it, and the notice of its end.

A stored job's record holds, beside what the queue needs, a **job metadata**: what a Router has to know of the request
to give its answer again, which the queue passes on unread. A **listed** job (one of the background) is kept however it
ends, with what it has said so far and why it ended, and stands in its tenant's list until it is forgotten. One with a
``notify`` word puts a notice of its end on its shard's stream of ends.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from . import codec
from .errors import BadMessage
from .ids import JobId, Pool, Tenant
from .job import OnLoss
from .lanes import Lane
from .lifecycle import TERMINAL, State

MAX_NOTE_BYTES = 256 * 1024
"""Largest note of a job_metadata."""
_NOTIFY = re.compile(r"[a-z][a-z0-9_.-]{0,31}")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobMetadata:
    """What is kept of a request beside its answer.

    ``path`` to ``choices`` are the request's, as in :class:`~queue_schemas.Job` and the Router's reading of its body;
    ``request`` is the digest of what was asked. ``resumable``: a client's stream, cancelled when nobody has followed it
    for a while. ``note`` belongs to whoever put the job there: it is given back as it is.
    """

    path: str = ""
    stream: bool = False
    on_loss: OnLoss = "restart"
    usage: bool = False
    choices: int = 1
    request_id: str = ""
    request: str = ""
    resumable: bool = False
    note: bytes = b""

    def pack(self) -> bytes:
        """A msgpack map. Raises ``BadMessage`` for a note that is too large."""
        if len(self.note) > MAX_NOTE_BYTES:
            raise BadMessage(f"the note of a kept job has {len(self.note)} bytes; it may have {MAX_NOTE_BYTES}")
        return codec.encode(
            {
                "v": 1,
                "path": self.path,
                "stream": self.stream,
                "on_loss": self.on_loss,
                "usage": self.usage,
                "choices": self.choices,
                "request_id": self.request_id,
                "request": self.request,
                "resumable": self.resumable,
                "note": self.note,
            }
        )

    @classmethod
    def unpack(cls, data: bytes) -> JobMetadata:
        """The job metadata in ``data``; of one that was never written, or by another version, what can be read."""
        fields: Any = codec.decode(data) if data else {}
        if type(fields) is not dict:
            raise BadMessage("a job_metadata is a map")
        known = {name: fields[name] for name, kind in _FIELDS.items() if type(fields.get(name)) is kind}
        if known.get("on_loss") not in ("continue", "restart", "fail"):
            known.pop("on_loss", None)
        return cls(**known)


_FIELDS: dict[str, type] = {
    "path": str,
    "stream": bool,
    "on_loss": str,
    "usage": bool,
    "choices": int,
    "request_id": str,
    "request": str,
    "resumable": bool,
    "note": bytes,
}


@dataclass(frozen=True, slots=True)
class PersistOptions:
    """How a stored job is kept: for ``keep_ms`` once it has ended. ``listed``: however it ends, and among its tenant's
    jobs. ``notify``: the word of its notice of end; empty for none."""

    keep_ms: int
    job_metadata: JobMetadata = field(default_factory=JobMetadata)
    listed: bool = False
    notify: str = ""

    def __post_init__(self) -> None:
        if self.notify and not _NOTIFY.fullmatch(self.notify):
            raise BadMessage(
                f"notify is {self.notify[:40]!r}; it must be 1 to 32 of a-z, 0-9 and _ . -, a letter first"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PersistedJob:
    """What may be told of a stored job. Times are the server's, in ms since 1970; None where there is none yet.

    ``now_ms`` is when it was read. ``expires_ms`` is when it is forgotten. ``cause`` says why it has no answer: of a
    listed job that is dead, cancelled or expired. ``persisted_bytes`` is what it counts for in its tenant's budget.
    ``begun_epoch`` is that of the attempt with which the kept output begins, 0 while nothing was said; ``replaced``: it
    began anew after another one had said something, which is not kept any more.
    """

    id: JobId
    tenant: Tenant
    model: Pool
    lane: Lane
    state: State
    epoch: int
    attempts: int
    now_ms: int
    created_ms: int
    deadline_ms: int
    started_ms: int | None = None
    ended_ms: int | None = None
    expires_ms: int | None = None
    cause: str = ""
    listed: bool = False
    notify: str = ""
    persisted_bytes: int = 0
    begun_epoch: int = 0
    replaced: bool = False
    job_metadata: JobMetadata = field(default_factory=JobMetadata)

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.state in TERMINAL

    @property
    def remaining_ms(self) -> int:
        """How long it may still take; 0 once it has ended."""
        return 0 if self.over else max(0, self.deadline_ms - self.now_ms)


@dataclass(frozen=True, slots=True)
class FinishedJob:
    """A notice: a job with a ``notify`` word ended. ``id`` names the notice; ``at_ms`` is the server's time."""

    id: str
    job_id: JobId
    tenant: Tenant
    state: State
    notify: str
    at_ms: int
