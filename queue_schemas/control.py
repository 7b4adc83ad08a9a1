"""Control messages to workers: job, wake, abort, yield, drain and ping.

They are read from the session's stream ``ctl:<session id>``. An entry has field ``k`` (the kind); an abort also ``job``
and ``why``; a yield ``job`` and ``aid``; a job ``id``, ``aid`` (the attempt id), ``left`` (ms until its deadline) and
``env`` (the envelope). Reading is by position (XREAD), so a message may be read twice: acting on one twice is
harmless. Unknown kinds are ignored: a newer Manager may send them.
"""

from __future__ import annotations

from enum import StrEnum

from .errors import BadMessage
from .ids import JobId, shard_of_job
from .job import Job
from .leases import Lease
from .records import record


class ControlKind(StrEnum):
    """What a control message tells a worker to do."""

    JOB = "job"
    """A job that is leased to the worker already: run it."""
    WAKE = "wake"
    """There may be work: claim."""
    ABORT = "abort"
    """Stop running ``job``: it was cancelled or its time ran out."""
    YIELD = "yield"
    """Stop attempt ``attempt_id`` of ``job``, if it may, and hand it back: an interactive job needs its slot."""
    DRAIN = "drain"
    """Claim no more, finish what runs, then exit."""
    PING = "ping"
    """Prove to be alive: renew at once."""


@record
class Control:
    """One message on a worker's control stream; ``job_id`` belongs to an abort and a yield, ``reason`` to an abort,
    ``attempt_id`` to a yield, ``lease`` to a job (None: it could not be read)."""

    kind: ControlKind
    job_id: JobId | None = None
    reason: str = ""
    lease: Lease | None = None
    attempt_id: str = ""

    def fields(self) -> dict[str, str]:
        """The stream entry."""
        entry = {"k": str(self.kind)}
        if self.job_id is not None:
            entry |= {"job": self.job_id, "why": self.reason}
        return entry


def parse_control(fields: dict[bytes, bytes]) -> Control | None:
    """The control message in a stream entry; None for a kind this version does not know. Raises ``BadMessage``, and
    ``BadRequest`` for a job that this version cannot read."""
    try:
        kind = ControlKind(fields[b"k"].decode())
    except (KeyError, ValueError):
        return None
    if kind in (ControlKind.ABORT, ControlKind.YIELD):
        job_id, reason, attempt_id = (
            fields.get(name, b"").decode("utf-8", "replace") for name in (b"job", b"why", b"aid")
        )
        shard_of_job(job_id)
        return Control(kind, JobId(job_id), reason, attempt_id=attempt_id)
    if kind is ControlKind.JOB:
        return Control(kind, lease=_first_attempt(fields))
    return Control(kind)


def _first_attempt(fields: dict[bytes, bytes]) -> Lease:
    try:
        attempt_id, remaining_ms = fields[b"aid"].decode("ascii"), int(fields[b"left"])
    except (KeyError, ValueError) as error:
        raise BadMessage("a job on a control stream comes with its attempt id and the time it has left") from error
    return Lease(Job.unpack(fields.get(b"env", b"")), 1, attempt_id, 1, remaining_ms, 0)
