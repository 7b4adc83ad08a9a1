"""One attempt at a job: its state while it runs, the reasons for which it is stopped, and the ways in which it ends."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum

from openai_api.completions.whole_answer import WholeAnswer
from queue_schemas import Job, Lease, Outcome
from queue_schemas.records import record

from ..core import FrameCutter, StreamStall, may_buffer
from ..core.slots import RETRY_APART_S
from ..frame_batcher import FrameSender


class StopReason(StrEnum):
    """Why a running attempt is stopped from outside."""

    JOB_ENDED = "job_ended"
    """The queue has ended the job: nobody takes its answer."""
    ENDED_BEFORE_START = "ended_before_start"
    """The queue had ended the job before it began here, unless the queue has lost that since."""
    DEADLINE = "deadline"
    """Its time ran out."""
    ROUTER_GONE = "router_gone"
    """The Router that waited is gone."""
    WORKER_STOPS = "worker_stops"
    """This worker hands its jobs back."""
    YIELDS = "yields"
    """An interactive job needs its slot."""
    STREAM_STALLED = "stream_stalled"
    """The engine forgot it while it served others."""


@dataclass(frozen=True, slots=True)
class StreamTimeouts:
    """How long a stream may stand still while its engine's others go on: of plain text, and where engines buffer output
    (:mod:`worker.core.stream_stall`)."""

    text_s: float
    buffered_s: float


@record
class Settle:
    """The attempt has an answer: ``frames`` are what of it has not been sent."""

    outcome: Outcome
    frames: bytes
    used: int | None = None
    """What it has cost (:mod:`scheduling.cost`); None: unknown."""


@record
class Release:
    """The job runs again elsewhere; ``counted``: this attempt is one of its ``max_attempts``."""

    reason: str
    counted: bool
    wait_s: float = RETRY_APART_S
    """If it is counted: when the job may come back here."""


@record
class Yield:
    """The job gives its slot to an interactive one. ``following``: the job as its next attempt is to run it; None:
    unchanged, or as its persisted output says."""

    reason: str
    following: Job | None = None


@dataclass(frozen=True, slots=True)
class EngineDisconnected:
    """The engine went away with the request."""

    reason: str


Ending = Settle | Release | Yield | EngineDisconnected | None
"""How an attempt ends; None: the queue has ended its job already."""


class Attempt:
    """One lease that runs here. ``started`` and ``deadline`` are times of the event loop (s)."""

    __slots__ = (
        "cutter",
        "deadline",
        "ending",
        "events",
        "has_slot",
        "lease",
        "may_buffer",
        "may_yield",
        "sender",
        "stall",
        "started",
        "stop_reason",
        "task",
        "whole",
    )

    def __init__(self, lease: Lease, started: float) -> None:
        self.lease = lease
        self.started = started
        self.deadline = started + lease.remaining_ms / 1000
        self.cutter = FrameCutter(lease)
        self.sender: FrameSender | None = None
        self.task: asyncio.Task[None] | None = None
        """Set by the task itself: one that is cancelled before its first step would never clean up."""
        self.stop_reason: StopReason | None = None
        self.ending = False
        """Whether the queue is being told how it ended: from then on the queue's answer decides."""
        self.events = 0
        """Of its stream, so far."""
        self.stall = StreamStall()
        self.has_slot = True
        """Whether its end frees a slot."""
        self.may_yield: bool | None = None
        """Whether it can be stopped, and its job go on behind what it said; None: that is being found out."""
        self.whole: WholeAnswer | None = None
        """What it said so far, if its answer is composed of a stream."""
        self.may_buffer: bool | None = None
        """Whether its engine may be silent for long; None: not needed yet."""

    @property
    def buffers(self) -> bool:
        """Whether the timeout of streams whose engines buffer output applies."""
        if self.stall.has_only_begun:
            return True
        if self.may_buffer is None:
            self.may_buffer = may_buffer(self.lease.job)
        return self.may_buffer

    def idle_timeout_s(self, timeouts: StreamTimeouts) -> float:
        """How long its stream may stand still while others go on."""
        return timeouts.buffered_s if self.buffers else timeouts.text_s

    def stop(self, reason: StopReason) -> None:
        """Cancel its task, unless it is stopped or ending already."""
        if self.stop_reason is None and not self.ending:
            self.stop_reason = reason
            if self.task is not None:
                self.task.cancel()


def log_fields(lease: Lease) -> dict[str, str | int]:
    """What every log line about a job says. Not bound to its task: that would cost each job what few of them log."""
    job = lease.job
    return {"job_id": job.id, "request_id": job.request_id, "attempt": lease.attempt, "epoch": lease.epoch}
