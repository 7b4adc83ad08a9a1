"""The output of persisted jobs, for any number of readers: digests that find a job by its idempotency key, and pages.

A job with an idempotency key is persisted: the same key and request of the same tenant leads to that job; another
request under the key is refused. Its output is a Redis stream (``out:<id>``), one frame per entry under the id
``epoch-seq``. It is always one answer: an attempt that starts again, rather than continuing the output, replaces it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from .frames import Frame
from .ids import JobId
from .job import Job
from .lifecycle import TERMINAL, State
from .records import record

PERSISTED_STATES = frozenset({State.DONE, State.FAILED})
"""States in which a job keeps its output and its key. A job that ends otherwise releases its key."""


def key_digest(job: Job) -> str:
    """The name of the job's idempotency key in Redis: SHA-256 of tenant and key; empty without a key."""
    if not job.idempotency_key:
        return ""
    return _digest(job.tenant.encode(), job.idempotency_key.encode())


def request_digest(job: Job) -> str:
    """SHA-256 of a job's path, content type and body, to recognize another request under the same key."""
    return digest_of(job.path, job.content_type, job.body)


def digest_of(path: str, content_type: str, body: bytes) -> str:
    """The digest of a request as its client sent it; the job made of it may have another body."""
    return _digest(path.encode(), content_type.encode(), body)


def _digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(b"%d:" % len(part))
        found.update(part)
    return found.hexdigest()


@record
class Enqueued:
    """The job that answers a request: the one enqueued, or the one that holds its idempotency key.

    ``predicted_ms``: how long it is thought to wait; None: unknown, or not at all.
    """

    job_id: JobId
    state: State
    predicted_ms: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class OutputPage:
    """A page of a persisted job's output.

    ``epoch`` and ``attempt_id`` are the job's (empty while it waits), ``end`` is ``(epoch, seq)`` of the frame that
    will be written next, ``(0, 0)`` if there is no frame yet. ``complete``: no more frames follow this page now.
    ``cause``: why a background job ended without an answer.
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
        """Whether the job has finished and no more frames follow."""
        return self.complete and self.state in TERMINAL
