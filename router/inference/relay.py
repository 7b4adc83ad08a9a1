"""Relays one answer from the queue to its client as it comes, and recovers what was lost on the way.

Nothing here sets a timer or takes a lock per request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from time import monotonic

from queue_schemas import (
    TERMINAL,
    BrokerFull,
    BrokerUnavailable,
    DeadlineExceeded,
    EngineFailed,
    Enqueued,
    InferqError,
    Job,
    OverCapacity,
    State,
    StreamBroken,
    new_job_id,
)
from scheduling.prediction import Place
from telemetry import get_logger

from ..http.bodies import ClientGone
from ..http.response_writer import QUEUED, ResponseWriter
from ..metrics import RouterMetrics
from ..queue_link import QueueLink
from .cancellation import Canceller
from .merging.attempt_merger import AttemptMerger
from .open_request import MAX_RESUBMISSIONS, OpenRequest
from .open_requests import OpenRequests

RESUBMIT_AFTER_S = 2.0
"""How long an answer whose job has ended may still be on its way."""
NO_SUCH_PATH_STATUSES = frozenset({404, 405, 501})
"""How engines answer on a path that they do not have."""
MAX_DIRECT_BYTES = 64 << 10
"""What may wait to be written without waiting for its client: more is counted, and written by a task."""
_NEVER = float("inf")

log = get_logger(__name__)


class Step(Enum):
    """What :meth:`Relay.advance` did."""

    RELAYED = "relayed"
    """What has come was written: more is to come."""
    ENDED = "ended"
    """The answer is complete."""
    UNUSUAL = "unusual"
    """Nothing: something must be waited for, or it failed."""


class Relay:
    """Puts ordinary jobs on the queue, and relays the answers of all jobs."""

    def __init__(
        self,
        link: QueueLink,
        requests: OpenRequests,
        canceller: Canceller,
        metrics: RouterMetrics,
        catch_up: Callable[[OpenRequest], Awaitable[None]],
    ) -> None:
        """``catch_up`` reads kept output of a persisted job into the request's merger."""
        self._link = link
        self._requests = requests
        self._canceller = canceller
        self._metrics = metrics
        self._catch_up = catch_up
        self._loop = asyncio.get_running_loop
        self._locating: set[asyncio.Task[None]] = set()

    async def enqueue(self, request: OpenRequest, job: Job) -> State:
        """Queue an ordinary ``job`` for ``request``. Raises ``OverCapacity`` and whatever the queue raises."""
        return await self.confirm(request, self._enqueue(request, job))

    async def confirm(self, request: OpenRequest, enqueued: asyncio.Future[Enqueued]) -> State:
        """Wait until the job of ``request`` is on the queue. Raises like :meth:`enqueue`."""
        try:
            found = await request.within_deadline(enqueued)
        except InferqError as error:
            if isinstance(error, OverCapacity | BrokerFull) and request.merger is not None:
                request.merger.settled = True  # nothing was written: there is nothing to cancel
            raise
        self._enqueued(request, found)
        return found.state

    def begin(self, request: OpenRequest, job: Job) -> asyncio.Future[Enqueued]:
        """Queue an ordinary ``job`` for a ``request`` without a task. Call :meth:`begun` when the future has a result;
        for all else, :meth:`confirm` in a task. Raises ``BrokerUnavailable``."""
        enqueued = self._enqueue(request, job)
        request.begin_call()
        return enqueued

    def begun(self, request: OpenRequest, found: Enqueued) -> None:
        """What began with :meth:`begin` is on the queue."""
        request.forbid_interrupt()
        self._enqueued(request, found)

    def _enqueue(self, request: OpenRequest, job: Job) -> asyncio.Future[Enqueued]:
        request.start_deadline(job.ttl_ms, self._loop().time())
        self._requests.attach(request, job)
        patience_ms, request.patience_ms = request.patience_ms, None
        return self._link.ready_queue().jobs.start_enqueue(job, patience_ms)

    def _enqueued(self, request: OpenRequest, found: Enqueued) -> None:
        if found.predicted_ms is not None:
            request.place = (Place(None, found.predicted_ms), self._loop().time())
        if found.state in TERMINAL:
            request.resubmit_at_s = self._loop().time() + RESUBMIT_AFTER_S

    def advance(self, request: OpenRequest, writer: ResponseWriter) -> Step:
        """Relay what has come to a client that takes it, as :meth:`run` does, from a callback."""
        merger, job = request.merger, request.job
        if merger is None or job is None or self._needs_task(request, merger):
            return Step.UNUSUAL
        head = merger.head
        if head is not None and (merger.ended or merger.pending_bytes):
            data = merger.take()
            self._observe(request, job)
            if merger.ended:
                request.connection.unwatch()
                writer.finish_now(head, data)
                return Step.ENDED
            writer.write_now(head, data)
        if request.keepalive_due:
            request.keepalive_due = False
            if (text := self._keepalive_text(request, job, merger)) is not None:
                request.last_sent_s = self._loop().time()
                writer.comment_now(text)
        return Step.RELAYED

    def _needs_task(self, request: OpenRequest, merger: AttemptMerger) -> bool:
        return bool(
            request.disconnected
            or merger.error is not None
            or request.error is not None
            or merger.pending_bytes > MAX_DIRECT_BYTES
            or (merger.ended and merger.head is None)
            or merger.lost_epoch
            or merger.gap
            or request.catching_up
            or request.frames_lost
            or request.fallback is not None
        )

    async def run(self, request: OpenRequest, writer: ResponseWriter) -> None:
        """Relay the answer of the request's job to its end.

        Raises ``ClientGone`` when the client goes, and the error that is to be answered.
        """
        merger, job = request.merger, request.job
        assert merger is not None and job is not None  # noqa: S101 - set when the job was queued or followed
        while True:
            await request.wait()
            if request.disconnected:
                raise ClientGone
            data = merger.take()
            if request.fallback is not None and merger.head is not None:
                data, merger = await self._fall_back(request, merger, data)
            if data or merger.ended:
                self._observe(request, job)
            head = merger.head
            if merger.ended and head is not None:
                request.connection.unwatch()
                self._requests.hold_answer(request, len(data))
                await writer.finish(head, data)  # the connection ends a client that does not read it
                return
            if data and head is not None:
                request.sending_since_s = request.last_sent_s
                await writer.write(head, data)
                request.sending_since_s = _NEVER
            error = merger.error or request.error
            if error is not None:
                raise self._with_limit(error, request.job or job)
            if merger.lost_epoch or merger.gap or request.catching_up or request.frames_lost or request.keepalive_due:
                await self._handle_interruption(request, job, merger, writer)

    async def _handle_interruption(
        self, request: OpenRequest, job: Job, merger: AttemptMerger, writer: ResponseWriter
    ) -> None:
        """Deal with a lost attempt, lost frames or silence:

        =====================================  ===========================================================
        The queue lost an attempt              :meth:`_resume`: the stream continues behind its text
        Output of a persisted job is behind    ``catch_up`` reads it
        Frames may be lost, none is known to   :meth:`_requeue`: the same id, if queue and merger agree
        Frames are lost, or the two disagree   :meth:`_recover` cancels the job and queues it under a new id
        Nothing came for a while               :meth:`_send_keepalive`
        =====================================  ===========================================================
        """
        if merger.lost_epoch:
            await self._resume(request, merger, merger.lost_epoch)
        if request.catching_up:
            await self._catch_up(request)
        elif merger.gap or request.frames_lost:
            await self._recover(request, merger)
        if request.keepalive_due:
            await self._send_keepalive(request, job, merger, writer)

    def _observe(self, request: OpenRequest, job: Job) -> None:
        """A piece of the answer goes to the client now."""
        now = monotonic()  # the loop's clock; asking the loop costs a system call to find it
        if not request.is_follower:
            if request.begun:
                self._metrics.itl.observe((job.model,), now - request.last_sent_s)
            else:
                self._metrics.ttft.observe((job.model,), now - request.started_s)
        request.begun = True
        request.last_sent_s = now

    def _keepalive_text(self, request: OpenRequest, job: Job, merger: AttemptMerger) -> str | None:
        """The comment for a silent connection; None within an event, where it would be a part of it."""
        if merger.mid_event:
            return None
        if not merger.untouched:
            return QUEUED
        if not self._link.directory.workers_of(job.model):
            return f"waiting for a worker that serves {job.model}"
        self._locate(request, job)
        return f"{QUEUED}{_place_text(request.place, self._loop().time())}"

    def _locate(self, request: OpenRequest, job: Job) -> None:
        """Ask where the job stands, for the next comment: this one cannot wait for the answer."""

        async def ask() -> None:
            with suppress(InferqError):
                (place,) = await self._link.ready_queue().jobs.places([job.id])
                request.place = None if place is None else (place, self._loop().time())

        task = self._loop().create_task(ask(), name="place")
        self._locating.add(task)
        task.add_done_callback(self._locating.discard)

    async def _send_keepalive(
        self, request: OpenRequest, job: Job, merger: AttemptMerger, writer: ResponseWriter
    ) -> None:
        request.keepalive_due = False
        text = self._keepalive_text(request, job, merger)
        if text is None:
            return
        request.sending_since_s = request.last_sent_s = self._loop().time()
        await writer.comment(text)
        request.sending_since_s = _NEVER

    async def _fall_back(self, request: OpenRequest, merger: AttemptMerger, data: bytes) -> tuple[bytes, AttemptMerger]:
        """Send the request in its other form if the engine says that it lacks the path: such an answer comes whole.
        Returns what to send and the merger from now on."""
        fallback, request.fallback = request.fallback, None
        assert merger.head is not None and fallback is not None  # noqa: S101 - checked by the caller
        if merger.head.status in NO_SUCH_PATH_STATUSES and await fallback() and request.merger is not None:
            merger = request.merger
            return merger.take(), merger  # it may have come meanwhile
        return data, merger

    async def _resume(self, request: OpenRequest, merger: AttemptMerger, epoch: int) -> None:
        """Tell the queue where a stream continues whose attempt was lost under ``epoch``."""
        job, prefix = request.job, merger.continuation_prefix()
        assert job is not None  # noqa: S101 - set by enqueue
        queue = self._link.ready_queue()
        try:
            state = await request.within_deadline(queue.jobs.resume(replace(job, prefix=prefix), epoch))
        except (BrokerUnavailable, BrokerFull) as error:
            log.warning("stream_not_resumed", job_id=job.id, error=error.message, then="the queue asks again")
            merger.on_resumed(epoch)
            return
        log.info("stream_resumed", job_id=job.id, request_id=job.request_id, epoch=epoch, delivered=len(prefix))
        merger.on_resumed(epoch)
        if state is None or state in TERMINAL:
            request.frames_lost = True

    async def _recover(self, request: OpenRequest, merger: AttemptMerger) -> None:
        """Frames of the answer may be lost: make sure that an attempt will deliver it, under another id if need be."""
        job = request.job
        assert job is not None  # noqa: S101 - set by enqueue
        request.frames_lost, request.resubmit_at_s = False, _NEVER
        if not merger.gap and await self._requeue(request, job, merger):
            return
        self._canceller.cancel(job.id, "frames of its answer were lost")
        self._metrics.cancelled("frames_lost")
        if request.resubmissions >= MAX_RESUBMISSIONS:
            broken = StreamBroken if merger.head is not None else EngineFailed
            raise broken("the answer was lost on its way here too often; send the request again")
        merger.restart()
        if merger.closed:
            request.notify()
            return
        request.resubmissions += 1
        self._metrics.resubmissions.inc()
        resubmitted = replace(
            job,
            id=new_job_id(self._link.ready_queue().shard_of(job.model)),
            ttl_ms=max(1, int((request.deadline_s - self._loop().time()) * 1000)),
            prefix=merger.continuation_prefix(),
        )
        log.info("request_resubmitted", job_id=resubmitted.id, previous=job.id, request_id=job.request_id)
        await self.enqueue(request, resubmitted)

    async def _requeue(self, request: OpenRequest, job: Job, merger: AttemptMerger) -> bool:
        """Put a job on the queue again under its own id: it is one job, whether the queue still knows it or not. False
        if what was seen of it and what the queue knows contradict each other: it must run again, under another id."""
        state = await self.enqueue(request, job)
        if state in TERMINAL:
            return True  # its end may still be on its way; if it does not come, that is a gap
        status = await request.within_deadline(self._link.ready_queue().jobs.raise_epoch(job.id, merger.epoch))
        if status is None or status.state in TERMINAL:
            request.resubmit_at_s = self._loop().time() + RESUBMIT_AFTER_S
            return True
        if status.state is State.QUEUED and not merger.untouched:
            return False
        if not merger.may_continue_with(status.epoch, status.attempt_id):
            return False
        if status.state is not State.LOST:  # a lost one is asked for again
            # It runs on, or will run. Should a frame be missing, the next one shows the gap.
            merger.require_epoch(status.epoch, status.attempt_id)
            if merger.closed:
                request.notify()
        return True

    def _with_limit(self, error: InferqError, job: Job) -> InferqError:
        """``error``; if a deadline passed, one that names the limit, and a missing worker if that is why."""
        if type(error) is not DeadlineExceeded:
            return error
        limit = job.deadline_from or f"{job.ttl_ms} ms"
        if not self._link.directory.workers_of(job.model):
            return DeadlineExceeded(
                f"no worker serves {job.model} now, and the request's time of {limit} ran out in the queue; start a "
                "worker for it, or ask for a longer deadline"
            )
        return DeadlineExceeded(f"{error.message}; its limit was {limit}: allow it more time, or ask for less")


def _place_text(found: tuple[Place, float] | None, now_s: float) -> str:
    """What a waiting client is told of its place, as it was some time ago."""
    if found is None:
        return ""
    place, at_s = found
    jobs = "" if place.jobs_ahead is None else f", position {place.jobs_ahead + 1}"
    if place.wait_ms is None:
        return jobs
    return f"{jobs}, about {max(1, round(place.wait_ms / 1000 - (now_s - at_s)))} s until it starts"
