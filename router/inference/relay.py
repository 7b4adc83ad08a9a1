"""The way of an answer from the queue to its client: passed on as it comes, and mended where something was lost.

Nothing here sets a timer or takes a lock per request.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from queue_schemas import (
    TERMINAL,
    BrokerFull,
    BrokerUnavailable,
    DeadlineExceeded,
    EngineFailed,
    InferqError,
    Job,
    OverCapacity,
    State,
    StreamBroken,
    new_job_id,
)
from telemetry import get_logger

from ..http.bodies import ClientGone
from ..http.response_writer import QUEUED, ResponseWriter
from ..jobs.persisted_requests import PersistedRequests
from ..metrics import ModelHistogram, RouterMetrics
from ..queue_link import QueueLink
from ..responses.chat_only_engines import NO_SUCH_PATH
from .attempt_merger import AttemptMerger
from .cancellation import Canceller
from .open_requests import OpenRequest, OpenRequests

MAX_RERUNS = 3
"""How often a request is put on the queue anew because frames of its answer were lost on the way."""
RERUN_AFTER_S = 2.0
"""How long an answer whose job has ended may still be on its way."""

_NEVER = float("inf")
_UNSEEN = ModelHistogram("inferq_given_again_seconds", "Not shown", ())
"""Times of what is given again, which nobody wants among those of what is waited for."""

log = get_logger(__name__)


class Relay:
    """Passes answers on."""

    def __init__(
        self,
        link: QueueLink,
        requests: OpenRequests,
        canceller: Canceller,
        metrics: RouterMetrics,
        persisted: PersistedRequests,
    ) -> None:
        self._link = link
        self._requests = requests
        self._canceller = canceller
        self._metrics = metrics
        self._persisted = persisted
        self._loop = asyncio.get_running_loop

    async def enqueue(self, request: OpenRequest, job: Job) -> State:
        """Queue an ordinary ``job`` for ``request``. Raises ``OverCapacity`` and whatever the queue raises."""
        request.give(job.ttl_ms)
        self._requests.attach(request, job)
        queue = self._link.ready_queue()
        try:
            state = await request.within_deadline(queue.jobs.enqueue(job))
        except (OverCapacity, BrokerFull):
            if request.stitch is not None:
                request.stitch.settled = True  # nothing was written: there is nothing to cancel
            raise
        if state in TERMINAL:
            request.rerun_s = self._loop().time() + RERUN_AFTER_S
        return state

    async def run(self, request: OpenRequest, exchange: ResponseWriter) -> None:
        """Pass the answer on as it comes."""
        stitch = request.stitch
        job = request.job
        assert stitch is not None and job is not None  # noqa: S101 - set by _enqueue
        metrics = self._metrics
        ttft, itl = (_UNSEEN, _UNSEEN) if request.follows else (metrics.ttft, metrics.itl)
        time = self._loop().time
        first = True
        while True:
            await request.wait()
            if request.gone:
                raise ClientGone
            data = stitch.take()
            if request.fallback is not None and stitch.head is not None:
                data, stitch = await self._other_way(request, stitch, data)
            if data or stitch.ended:
                now = time()
                if first:
                    ttft.observe(job.model, now - request.begun_s)
                    first = False
                else:
                    itl.observe(job.model, now - request.quiet_since_s)
                request.quiet_since_s = now
            head = stitch.head
            if stitch.ended and head is not None:
                request.connection.unwatch()
                self._requests.hold_answer(request, len(data))
                await exchange.finish(head, data)  # the connection ends a client that does not read it
                return
            if data and head is not None:
                request.sending_since_s = request.quiet_since_s
                await exchange.write(head, data)
                request.sending_since_s = _NEVER
            error = stitch.error or request.error
            if error is not None:
                raise self._explained(error, request)
            if stitch.lost_epoch:
                await self._resume(request, stitch.lost_epoch)
            if request.behind or stitch.gap or request.lost:
                await self._recover(request)
            if request.keepalive_due:
                await self._comment(request, job, stitch, exchange)

    async def _comment(self, request: OpenRequest, job: Job, stitch: AttemptMerger, exchange: ResponseWriter) -> None:
        """Keep a silent connection alive, but within an event, where a comment would be a part of it."""
        request.keepalive_due = False
        if stitch.mid_event:
            return
        request.sending_since_s = request.quiet_since_s = self._loop().time()
        await exchange.comment(self._waits_for(job, stitch))
        request.sending_since_s = _NEVER

    async def _other_way(self, request: OpenRequest, stitch: AttemptMerger, data: bytes) -> tuple[bytes, AttemptMerger]:
        """Hold back an answer that says that the engine has no such path until it is whole, and ask in another way
        then. What is to be sent, and what makes the answer from now on."""
        assert stitch.head is not None and request.fallback is not None  # noqa: S101 - looked at by whoever calls
        refused = stitch.head.status in NO_SUCH_PATH
        request.held_back += data
        if refused and not stitch.ended:
            return b"", stitch
        fallback, request.fallback = request.fallback, None
        data, request.held_back = request.held_back, b""
        if refused and await fallback() and request.stitch is not None:
            return b"", request.stitch
        return data, stitch

    def _waits_for(self, job: Job, stitch: AttemptMerger) -> str:
        """What a client of a silent stream is told."""
        if stitch.untouched and not self._link.directory.workers_of(job.model):
            return f"waiting for a worker that serves {job.model}"
        return QUEUED

    async def _resume(self, request: OpenRequest, epoch: int) -> None:
        """Tell the queue where a stream goes on whose attempt was lost under ``epoch``."""
        stitch, job = request.stitch, request.job
        assert stitch is not None and job is not None  # noqa: S101 - set by _enqueue
        prefix = stitch.offer()
        queue = self._link.ready_queue()
        try:
            state = await request.within_deadline(queue.jobs.resume(replace(job, prefix=prefix), epoch))
        except (BrokerUnavailable, BrokerFull) as error:
            log.warning("stream_not_resumed", job_id=job.id, error=error.message, then="the queue asks again")
            stitch.heard(epoch)
            return
        log.info("stream_resumed", job_id=job.id, request_id=job.request_id, epoch=epoch, delivered=len(prefix))
        stitch.heard(epoch)
        if state is None or state in TERMINAL:
            request.lost = True

    async def _recover(self, request: OpenRequest) -> None:
        """What has come is not all that there was."""
        if request.behind:
            await self._persisted.catch_up(request)
        else:
            await self._again(request)

    async def _again(self, request: OpenRequest) -> None:
        """Frames of the answer may be lost: make sure that an attempt will deliver it, under another id if need be."""
        stitch, job = request.stitch, request.job
        assert stitch is not None and job is not None  # noqa: S101 - set by _enqueue
        request.lost, request.rerun_s = False, _NEVER
        if not stitch.gap and await self._stands(request, job, stitch):
            return
        self._canceller.cancel(job.id, "frames of its answer were lost")
        self._metrics.cancelled("frames_lost")
        if request.reruns >= MAX_RERUNS:
            broken = StreamBroken if stitch.head is not None else EngineFailed
            raise broken("the answer was lost on its way here too often; send the request again")
        stitch.restart()
        if stitch.closed:
            request.notify()
            return
        request.reruns += 1
        self._metrics.resubmissions.inc()
        remaining_ms = max(1, int((request.deadline_s - self._loop().time()) * 1000))
        again = replace(
            job,
            id=new_job_id(self._link.ready_queue().shard_of(job.model)),
            ttl_ms=remaining_ms,
            prefix=stitch.offer(),
        )
        log.info("request_runs_again", job_id=again.id, before=job.id, request_id=job.request_id)
        await self.enqueue(request, again)

    async def _stands(self, request: OpenRequest, job: Job, stitch: AttemptMerger) -> bool:
        """Put a job on the queue again under its own id: it is one job, whether the queue still knows it or not. False
        if what was heard of it and what the queue knows do not go together: it must run anew, under another id."""
        state = await self.enqueue(request, job)
        if state in TERMINAL:
            return True  # its end may still be on its way; if it does not come, that is a gap
        standing = await request.within_deadline(self._link.ready_queue().jobs.raise_epoch(job.id, stitch.epoch))
        if standing is None or standing.state in TERMINAL:
            request.rerun_s = self._loop().time() + RERUN_AFTER_S
            return True
        if standing.state is State.QUEUED and not stitch.untouched:
            return False
        if not stitch.agrees(standing.epoch, standing.attempt_id):
            return False
        if standing.state is not State.LOST:  # one that is lost is asked for again
            # It runs on, or will run. Should a frame be missing, the next one shows the gap.
            stitch.expect(standing.epoch, standing.attempt_id)
            if stitch.closed:
                request.notify()
        return True

    def _explained(self, error: InferqError, request: OpenRequest) -> InferqError:
        """A deadline that passed says which limit that was; and that nobody serves the model, if that is why."""
        job = request.job
        if type(error) is not DeadlineExceeded or job is None or "(set by " in error.message:
            return error
        limit = job.deadline_from or f"{job.ttl_ms} ms"
        if not self._link.directory.workers_of(job.model):
            return DeadlineExceeded(
                f"no worker serves {job.model} now, and the request's time of {limit} ran out in the queue; start a "
                "worker for it, or ask for a longer deadline"
            )
        return DeadlineExceeded(f"{error.message}; its limit was {limit}: allow it more time, or ask for less")
