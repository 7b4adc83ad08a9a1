"""Requests for persisted jobs: those with an idempotency key, which lead to one job, whoever asked for it first and
wherever; those whose stream may be resumed; and those that only follow a job that was put on the queue before.

The one that creates the job gets its answer as it comes, at no more cost than any other request. Whoever comes later,
or missed something, reads what is kept first, a page at a time and no faster than its client reads, and goes on from
there.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from queue_schemas import (
    PERSISTED_STATES,
    TERMINAL,
    BrokerFull,
    BrokerUnavailable,
    EngineFailed,
    Enqueued,
    IdempotencyKeyReused,
    Job,
    JobNotFound,
    Marker,
    MarkerKind,
    OutputPage,
    OverCapacity,
    PersistedJob,
    PersistOptions,
    State,
    StreamBroken,
)
from telemetry import get_logger

from ..http.response_writer import ResponseWriter
from ..inference.attempt_merger import AttemptMerger
from ..inference.cancellation import Canceller
from ..inference.followers import fall_behind
from ..inference.open_requests import OpenRequest, OpenRequests
from ..metrics import RouterMetrics
from ..queue_link import QueueLink
from ..settings import RouterSettings
from .disconnect_grace import DisconnectGrace

REPLAY_HEADER = (b"x-inferq-idempotent-replay", b"true")
"""On an answer that another request's job gives."""
READ_AGAIN_S = 1.0
"""How long until a request whose answer could not be read tries again."""
MAX_LOSSES = 3
"""How often a persisted job that the queue has lost is put there again for one request."""

log = get_logger(__name__)


class PersistedRequests:
    """The way of a request to its persisted job, and of that job's answer to the request."""

    def __init__(
        self,
        settings: RouterSettings,
        link: QueueLink,
        requests: OpenRequests,
        canceller: Canceller,
        disconnect_grace: DisconnectGrace,
        metrics: RouterMetrics,
    ) -> None:
        self._settings = settings
        self._link = link
        self._requests = requests
        self._canceller = canceller
        self._disconnect_grace = disconnect_grace
        self._metrics = metrics

    async def enqueue(self, request: OpenRequest, job: Job, exchange: ResponseWriter | None = None) -> None:
        """Queue ``job`` for ``request``, kept as it says, or follow the one that holds its key; ``exchange`` says then
        that it is one.

        Raises ``IdempotencyKeyReused``, ``OverCapacity`` and whatever the queue raises.
        """
        request.give(job.ttl_ms)
        request.behind = False
        self._requests.attach(request, job)
        link = self._link
        try:
            found = await request.within_deadline(
                link.ready_queue().jobs.enqueue_persisted(job, request.keep, link.session_id)
            )
        except (IdempotencyKeyReused, OverCapacity, BrokerFull):
            if request.stitch is not None:
                request.stitch.settled = True  # nothing was written: there is nothing to detach from
            raise
        if found.job_id != job.id:
            log.info("request_known", job_id=found.job_id, request_id=job.request_id, state=found.state.value)
            self._requests.attach(request, replace(job, id=found.job_id))
            if exchange is not None:
                exchange.add_header(*REPLAY_HEADER)
        if found != Enqueued(job.id, State.QUEUED):
            fall_behind(request)

    def follow(
        self, request: OpenRequest, kept: PersistedJob, job: Job | None = None, stitch: AttemptMerger | None = None
    ) -> None:
        """From now on ``request`` is given the answer of a job that is on the queue, from its beginning. ``job``: what
        it asked itself, to be queued again should the queue have lost it. ``stitch``: what makes the answer of the
        job's frames, if it is not to be given as it is kept."""
        job_metadata = kept.metadata
        request.follows = job is None
        request.keep = PersistOptions(self._settings.resumable_retention_ms, replace(job_metadata, note=b""))
        request.give(kept.remaining_ms + self._settings.max_deadline_ms)
        request.stitch = stitch or AttemptMerger(
            stream=job_metadata.stream,
            replay_limit_bytes=self._settings.max_replay_bytes,
            on_loss=job_metadata.on_loss,
            usage=job_metadata.include_usage,
            choices=job_metadata.choices,
            persisted=True,
        )
        followed = job or Job(
            id=kept.id, tenant=kept.tenant, model=kept.model, path=job_metadata.path, body=b"", lane=kept.lane
        )
        self._requests.attach(
            request,
            replace(
                followed,
                id=kept.id,
                stream=job_metadata.stream,
                persisted=True,
                on_loss=job_metadata.on_loss,
                reply_to="",
            ),
        )
        fall_behind(request)

    async def catch_up(self, request: OpenRequest) -> None:
        """Read on in what is kept of the job; what came live meanwhile follows the last page."""
        stitch, job, link = request.stitch, request.job, self._link
        assert stitch is not None and job is not None  # noqa: S101 - set by enqueue
        request.held = []
        try:
            page = await request.within_deadline(
                link.ready_queue().output.attach(job.id, link.session_id, stitch.position)
            )
        except BrokerUnavailable as error:
            log.warning("answer_not_read", job_id=job.id, error=error.message, then="it is tried again")
            request.held = None
            await request.within_deadline(asyncio.sleep(READ_AGAIN_S))
            request.notify()
            return
        held, request.held = request.held, None
        request.notify()
        if page is None and request.follows:
            raise JobNotFound(f"the job {job.id} is not kept any more: it was deleted, or has expired")
        if page is None:
            await self._queue_again(request, job)
            return
        given_up = page.state in TERMINAL and page.state not in PERSISTED_STATES
        if given_up and not page.frames:
            self._ended(request, job, page)
        elif stitch.reread(page.epoch, page.attempt_id, page.frames, given_up=given_up):
            for frame in page.frames:
                stitch.on_frame(frame)
            if given_up and page.over and not stitch.gap:
                self._ended(request, job, page)
            elif stitch.gap or (page.over and not stitch.closed):
                stitch.error = StreamBroken("a part of the answer is not kept any more; send the request again")
            elif page.complete and held is not None:
                self._requests.followers.caught_up(request, held)

    def leave(self, request: OpenRequest, job: Job) -> None:
        """A request for ``job`` is over: the job runs on for whoever asks again, or follows it here still; a stream
        that may be resumed for its grace."""
        self._canceller.detach(job.id, self._link.session_id)
        if request.keep.metadata.resumable:
            self._disconnect_grace.add(job.id, asyncio.get_running_loop().time())

    def _ended(self, request: OpenRequest, job: Job, page: OutputPage) -> None:
        """The job ended without an answer; what it had said was given."""
        stitch = request.stitch
        assert stitch is not None  # noqa: S101 - set by who follows
        request.behind = False
        epoch, cause = max(page.epoch, stitch.epoch), page.cause or "no answer of it was kept"
        stitch.on_marker(Marker(MarkerKind(page.state.value), job.id, epoch, cause))

    async def _queue_again(self, request: OpenRequest, job: Job) -> None:
        """The queue has lost the job with its latest writes: it is queued again by its id, unless somebody else did, or
        has asked for the same anew."""
        stitch = request.stitch
        assert stitch is not None  # noqa: S101 - set by enqueue
        stitch.restart()
        if stitch.closed:
            return
        if request.reruns >= MAX_LOSSES:
            broken = StreamBroken if stitch.head is not None else EngineFailed
            raise broken("the request was lost on the queue too often; send it again")
        request.reruns += 1
        self._metrics.resubmissions.inc()
        log.info("request_runs_again", job_id=job.id, before=job.id, request_id=job.request_id)
        left_ms = max(1, int((request.deadline_s - asyncio.get_running_loop().time()) * 1000))
        await self.enqueue(request, replace(job, ttl_ms=left_ms))
