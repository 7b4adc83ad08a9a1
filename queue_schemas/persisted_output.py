"""Stored jobs: their answer is kept, for whoever asks again and for as many as listen at once.

A job with an idempotency key is stored: the same key and request of the same tenant leads to that job; another request
under the key is refused. Its output stands in a stream of its own (``out:<id>``), frame by frame
under ids ``epoch-seq``, and is at all times one answer: an attempt that begins anew, rather than behind the output so
far, replaces it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from .frames import Frame
from .ids import JobId
from .job import Job
from .lifecycle import TERMINAL, State

PERSISTED_STATES = frozenset({State.DONE, State.FAILED})
"""How a job ends whose output is kept. One that ends otherwise lets go of its key: asked again, it runs anew."""


def key_digest(job: Job) -> str:
    """What names the job's idempotency key in Redis: SHA-256 of tenant and key; empty without a key."""
    if not job.idempotency_key:
        return ""
    return _digest(job.tenant.encode(), job.idempotency_key.encode())


def request_digest(job: Job) -> str:
    """SHA-256 of what a job asks: its path, content type and body. It tells another request under the same key."""
    return digest_of(job.path, job.content_type, job.body)


def digest_of(path: str, content_type: str, body: bytes) -> str:
    """The same of a request as its client sent it, of which a job may have been made that asks less."""
    return _digest(path.encode(), content_type.encode(), body)


def _digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(b"%d:" % len(part))
        found.update(part)
    return found.hexdigest()


@dataclass(frozen=True, slots=True)
class Enqueued:
    """The job that answers a stored request: the one that was queued, or the one that holds its idempotency key."""

    job_id: JobId
    state: State


@dataclass(frozen=True, slots=True)
class Output:
    """A page of what is kept of a stored job.

    ``epoch`` and ``attempt_id`` are the job's (empty while it waits), ``end`` is ``(epoch, seq)`` of the frame that
    will be written next, ``(0, 0)`` if none was ever. ``complete``: there are no more frames behind this page now.
    ``cause``: why a job ended of which something is kept though it has no answer.
    """

    state: State
    epoch: int
    attempt_id: str
    end: tuple[int, int]
    frames: tuple[Frame, ...]
    complete: bool
    cause: str = ""

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.complete and self.state in TERMINAL
