"""Control messages to workers: wake, abort, drain and ping, read from the session's stream ``ctl:<session id>``.

An entry has field ``k`` (the kind) and, for an abort, ``job`` and ``why``. Reading is by position (XREAD), so a message
may be read twice: acting on one twice is harmless. Unknown kinds are ignored: a newer Manager may send them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from .ids import JobId, shard_of_job


class ControlKind(StrEnum):
    """What a control message tells a worker to do."""

    WAKE = "wake"
    """There may be work: claim."""
    ABORT = "abort"
    """Stop running ``job``: it was cancelled or its time ran out."""
    DRAIN = "drain"
    """Claim no more, finish what runs, then exit."""
    PING = "ping"
    """Prove to be alive: renew at once."""


@dataclass(frozen=True, slots=True)
class Control:
    """One message on a worker's control stream; ``job_id`` and ``reason`` belong to an abort."""

    kind: ControlKind
    job_id: JobId | None = None
    reason: str = ""

    def fields(self) -> dict[str, str]:
        """The stream entry."""
        entry = {"k": str(self.kind)}
        if self.job_id is not None:
            entry |= {"job": self.job_id, "why": self.reason}
        return entry


def parse_control(fields: dict[bytes, bytes]) -> Control | None:
    """The control message in a stream entry; None for a kind this version does not know. Raises ``BadMessage``."""
    try:
        kind = ControlKind(fields[b"k"].decode())
    except (KeyError, ValueError):
        return None
    if kind is ControlKind.ABORT:
        job_id = fields.get(b"job", b"").decode("utf-8", "replace")
        shard_of_job(job_id)
        return Control(kind, JobId(job_id), fields.get(b"why", b"").decode("utf-8", "replace"))
    return Control(kind)
