"""Records of persisted jobs, for Routers and the notifier: request metadata, job status, and the notice of its end.

The record of a persisted job holds, beside what the queue needs, **metadata**: what a Router needs to give the answer
again, which the queue does not read. A **background** job stays in its tenant's list until it is deleted or expires,
however it ends, with its output so far and the cause of its end. A job with a ``topic`` adds a notice of its end to its
shard's stream of finished jobs.
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
"""Largest note in a job's metadata."""
_TOPIC = re.compile(r"[a-z][a-z0-9_.-]{0,31}")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobMetadata:
    """The parts of a request that are needed to give its answer again.

    ``path`` to ``choices`` are the request's, as in :class:`~queue_schemas.Job` and the Router's reading of its body;
    ``request_digest`` is that of the request as its client sent it. ``resumable``: a client's stream, cancelled when no
    client has followed it for a while. ``note`` is returned unchanged to the service that enqueued the job.
    """

    path: str = ""
    stream: bool = False
    on_loss: OnLoss = "restart"
    include_usage: bool = False
    choices: int = 1
    request_id: str = ""
    request_digest: str = ""
    resumable: bool = False
    note: bytes = b""

    def pack(self) -> bytes:
        """A msgpack map. Raises ``BadMessage`` for a note that is too large."""
        if len(self.note) > MAX_NOTE_BYTES:
            raise BadMessage(f"the note of a persisted job has {len(self.note)} bytes; it may have {MAX_NOTE_BYTES}")
        return codec.encode({"v": 1} | {name: getattr(self, name) for name in _FIELDS})

    @classmethod
    def unpack(cls, data: bytes) -> JobMetadata:
        """The metadata in ``data``; fields that are missing, or of another version, get their defaults."""
        fields: Any = codec.decode(data) if data else {}
        if type(fields) is not dict:
            raise BadMessage("job metadata is a map")
        known = {name: fields[name] for name, kind in _FIELDS.items() if type(fields.get(name)) is kind}
        if known.get("on_loss") not in ("continue", "restart", "fail"):
            known.pop("on_loss", None)
        return cls(**known)


_FIELDS: dict[str, type] = {
    "path": str,
    "stream": bool,
    "on_loss": str,
    "include_usage": bool,
    "choices": int,
    "request_id": str,
    "request_digest": str,
    "resumable": bool,
    "note": bytes,
}


@dataclass(frozen=True, slots=True)
class PersistOptions:
    """What is kept of a persisted job, for ``retention_ms`` once it has finished.

    Without ``background``, only an answer is kept; with it, the job stays in its tenant's list however it ends.
    ``topic`` is that of the notice of its end; empty for no notice.
    """

    retention_ms: int
    metadata: JobMetadata = field(default_factory=JobMetadata)
    background: bool = False
    topic: str = ""

    def __post_init__(self) -> None:
        if self.topic and not _TOPIC.fullmatch(self.topic):
            raise BadMessage(
                f"topic is {self.topic[:40]!r}; it must be 1 to 32 of a-z, 0-9 and _ . -, starting with a letter"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PersistedJob:
    """The status of a persisted job, read at ``now_ms``. Times are the server's, in ms since 1970; None if not reached.

    ``expires_ms`` is when it is deleted. ``cause`` says why a background job that is dead, cancelled or expired has no
    answer. ``persisted_bytes`` count against its tenant's budget. ``output_epoch`` is the epoch of the attempt that the
    persisted output begins with, 0 while there is none; ``output_replaced``: that attempt began the answer again, and
    the output of an earlier one was dropped.
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
    background: bool = False
    topic: str = ""
    persisted_bytes: int = 0
    output_epoch: int = 0
    output_replaced: bool = False
    metadata: JobMetadata = field(default_factory=JobMetadata)

    @property
    def over(self) -> bool:
        """Whether it has finished."""
        return self.state in TERMINAL

    @property
    def remaining_ms(self) -> int:
        """Time left until its deadline; 0 once it has finished."""
        return 0 if self.over else max(0, self.deadline_ms - self.now_ms)


@dataclass(frozen=True, slots=True)
class FinishedJob:
    """The notice that a job with a ``topic`` finished. ``id`` is the notice's own; ``at_ms`` is the server's time."""

    id: str
    job_id: JobId
    tenant: Tenant
    state: State
    topic: str
    at_ms: int
