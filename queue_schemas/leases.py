"""Leases: what a claim returns to a worker, and what the queue answers when an attempt ends."""

from __future__ import annotations

from enum import StrEnum

from .job import Job
from .records import record


@record
class Lease:
    """The right to run one attempt of a job. Every later call of the attempt carries ``epoch`` and ``attempt_id``.

    ``attempt`` counts from 1. ``remaining_ms`` is the time left until the deadline and ``waited_ms`` the time since the
    enqueue, both as the server saw them at the claim. ``suspect``: an engine crashed while the job ran on it; a worker
    holds at most one such job. ``predicted_ms``: how long it was thought to wait as it came; None: it was not known, or
    it did not have to wait.
    """

    job: Job
    epoch: int
    attempt_id: str
    attempt: int
    remaining_ms: int
    waited_ms: int
    suspect: bool = False
    predicted_ms: int | None = None


@record
class Claimed:
    """The answer to a claim. ``parked``: the worker is parked, and may be handed ``offered`` more jobs without claiming
    them. ``handed_over``: how many the session was handed so far on the shard."""

    leases: tuple[Lease, ...] = ()
    parked: bool = False
    handed_over: int = 0
    offered: int = 0


class Outcome(StrEnum):
    """How an attempt that produced an answer ended."""

    DONE = "done"
    FAILED = "failed"
    """The answer is an error (status 400 or above)."""
    EXPIRED = "expired"
    """The job's time ran out while it ran: its worker noticed before the queue's sweep did."""


class Settled(StrEnum):
    """The queue's answer to a call that ends an attempt."""

    OK = "ok"
    DUPLICATE = "duplicate"
    """This attempt has ended the job before: a repeat, without effect."""
    FENCED = "fenced"
    """The attempt no longer owns the job: whatever it produced was dropped."""
    GONE = "gone"
    """Nothing is known of the job."""
