"""Connects requests to persisted jobs: queues or follows the job, reads its kept output, and lets go of it.

Such a request carries an idempotency key, which leads to one job from any Router; or its stream is resumable; or it
follows a job that was queued before. The request that creates the job gets its answer live, at no more cost than any
other request. Any other one, or one that missed something, first reads the kept output, a page at a time and no faster
than its client reads, and then continues live.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from starlette.types import Send

from queue_schemas import (
    PERSISTED_STATES,
    TERMINAL,
    BadRequest,
    BrokerFull,
    BrokerUnavailable,
    EngineFailed,
    Enqueued,
    IdempotencyKeyReused,
    Job,
    JobId,
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
from queue_schemas.persisted_output import request_digest
from telemetry import get_logger

from ..http.response_writer import ResponseWriter
from ..inference.cancellation import Canceller
from ..inference.merging.attempt_merger import AttemptMerger
from ..inference.open_request import MAX_RESUBMISSIONS, OpenRequest
from ..inference.open_requests import OpenRequests
from ..metrics import RouterMetrics
from ..queue_link import QueueLink
from ..settings import RouterSettings
from .disconnect_grace import DisconnectGrace
from .event_ids import LAST_EVENT_HEADER, find_position
from .resumable_writer import ResumableWriter

REPLAY_HEADER = (b"x-inferq-idempotent-replay", b"true")
"""On an answer that another request's job gives."""
READ_AGAIN_S = 1.0
"""How long until a request whose output could not be read tries again."""

log = get_logger(__name__)


class PersistedRequests:
    """The requests of one Router for persisted jobs: a :class:`router.inference.ports.PersistedMode`."""

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
        self._loop = asyncio.get_running_loop

    def resumable_writer(
        self, send: Send, request_id: bytes, path: str, last_event_id: bytes, *, keyed: bool
    ) -> ResumableWriter:
        """The writer of a stream behind the event of ``last_event_id``: one that names its job, or is of its key's."""
        found = find_position(last_event_id.decode("latin-1"))
        after = found if found is not None and (keyed or found.job_id) else None
        return ResumableWriter(send, request_id, after, path)

    async def start(self, request: OpenRequest, job: Job, writer: ResponseWriter) -> None:
        """Queue ``job`` for ``request``, or follow the job that its key or the client's last event names.

        Raises ``JobNotFound`` if that job is not kept any more and ``BadRequest`` if it is another request's.
        """
        resumes = writer.after.job_id if isinstance(writer, ResumableWriter) and writer.after is not None else None
        if resumes is None or job.idempotency_key:
            await self._enqueue(request, job, writer)
        else:
            persisted = await request.within_deadline(self._link.ready_queue().persisted_jobs.get(resumes))
            if persisted is None or persisted.tenant != job.tenant:
                raise _stream_not_found(resumes)
            if persisted.metadata.request_digest != request_digest(job):
                raise BadRequest(
                    f"{LAST_EVENT_HEADER} names the stream of another request: its path, content type or body was not "
                    "the same",
                    param=LAST_EVENT_HEADER,
                )
            self.follow(request, persisted, job)
        assert request.job is not None and request.merger is not None  # noqa: S101 - it is queued or followed
        if resumes not in (None, request.job.id):
            raise _stream_not_found(resumes)
        request.merger.bind_job(request.job.id)
        if isinstance(writer, ResumableWriter):
            writer.bind_job(request.job.id)

    def follow(
        self,
        request: OpenRequest,
        persisted: PersistedJob,
        job: Job | None = None,
        merger: AttemptMerger | None = None,
    ) -> None:
        """Relay the answer of a job that is on the queue to ``request``, from its beginning. ``job``: what the request
        asks itself, to be queued again should the queue have lost it. ``merger``: if the answer is not to be relayed as
        it is kept."""
        metadata = persisted.metadata
        request.is_follower = job is None
        request.persist_options = PersistOptions(self._settings.resumable_retention_ms, replace(metadata, note=b""))
        request.start_deadline(persisted.remaining_ms + self._settings.max_deadline_ms, self._loop().time())
        request.merger = merger or AttemptMerger(
            stream=metadata.stream,
            replay_limit_bytes=self._settings.max_replay_bytes,
            on_loss=metadata.on_loss,
            usage=metadata.include_usage,
            choices=metadata.choices,
            persisted=True,
        )
        followed = job or Job(
            id=persisted.id,
            tenant=persisted.tenant,
            model=persisted.model,
            path=metadata.path,
            body=b"",
            lane=persisted.lane,
        )
        self._requests.attach(
            request,
            replace(
                followed,
                id=persisted.id,
                stream=metadata.stream,
                persisted=True,
                on_loss=metadata.on_loss,
                reply_to="",
            ),
        )
        request.start_catching_up()

    async def catch_up(self, request: OpenRequest) -> None:
        """Read one page of the job's kept output; what came live meanwhile follows the last page."""
        merger, job, link = request.merger, request.job, self._link
        assert merger is not None and job is not None  # noqa: S101 - set when the job was queued or followed
        request.live_buffer = []
        try:
            page = await request.within_deadline(
                link.ready_queue().output.attach(job.id, link.session_id, merger.position)
            )
        except BrokerUnavailable as error:
            log.warning("output_not_read", job_id=job.id, error=error.message, then="it is tried again")
            request.live_buffer = None
            await request.within_deadline(asyncio.sleep(READ_AGAIN_S))
            request.notify()
            return
        live, request.live_buffer = request.live_buffer, None
        request.notify()
        if page is None and request.is_follower:
            raise JobNotFound(f"the job {job.id} is not kept any more: it was deleted, or has expired")
        if page is None:
            await self._requeue(request, job, merger)
            return
        unanswered = page.state in TERMINAL and page.state not in PERSISTED_STATES
        if unanswered and not page.frames:
            self._end_without_answer(request, job, merger, page)
        elif merger.reread(page.epoch, page.attempt_id, page.frames, unanswered=unanswered):
            for frame in page.frames:
                merger.on_frame(frame)
            if unanswered and page.over and not merger.gap:
                self._end_without_answer(request, job, merger, page)
            elif merger.gap or (page.over and not merger.closed):
                merger.error = StreamBroken("a part of the answer is not kept any more; send the request again")
            elif page.complete and live is not None:
                self._requests.followers.resume_live(request, live)

    def leave(self, request: OpenRequest, job: Job) -> None:
        """``request`` is over before ``job``, which runs on for other requests; a resumable stream for its grace."""
        self._canceller.detach(job.id, self._link.session_id)
        if request.persist_options.metadata.resumable:
            self._disconnect_grace.add(job.id, asyncio.get_running_loop().time())

    async def _enqueue(self, request: OpenRequest, job: Job, writer: ResponseWriter | None = None) -> None:
        """Queue ``job`` for ``request``, or follow the one that holds its key: ``writer`` says so then.

        Raises ``IdempotencyKeyReused``, ``OverCapacity`` and whatever the queue raises.
        """
        request.start_deadline(job.ttl_ms, self._loop().time())
        request.catching_up = False
        self._requests.attach(request, job)
        link = self._link
        patience_ms, request.patience_ms = request.patience_ms, None
        try:
            jobs = link.ready_queue().jobs
            found = await request.within_deadline(
                jobs.enqueue_persisted(job, request.persist_options, link.session_id, patience_ms)
            )
        except (IdempotencyKeyReused, OverCapacity, BrokerFull):
            if request.merger is not None:
                request.merger.settled = True  # nothing was written: there is nothing to detach from
            raise
        if found.job_id != job.id:
            log.info("idempotent_replay", job_id=found.job_id, request_id=job.request_id, state=found.state.value)
            self._requests.attach(request, replace(job, id=found.job_id))
            if writer is not None:
                writer.add_header(*REPLAY_HEADER)
        if found != Enqueued(job.id, State.QUEUED):
            request.start_catching_up()

    async def _requeue(self, request: OpenRequest, job: Job, merger: AttemptMerger) -> None:
        """Queue the job again by its id: the queue has lost it with its latest writes. Another request may have queued
        it, or the same under another id, by now."""
        merger.restart()
        if merger.closed:
            return
        if request.resubmissions >= MAX_RESUBMISSIONS:
            broken = StreamBroken if merger.head is not None else EngineFailed
            raise broken("the request was lost on the queue too often; send it again")
        request.resubmissions += 1
        self._metrics.resubmissions.inc()
        log.info("job_requeued", job_id=job.id, request_id=job.request_id)
        left_ms = max(1, int((request.deadline_s - asyncio.get_running_loop().time()) * 1000))
        await self._enqueue(request, replace(job, ttl_ms=left_ms))

    def _end_without_answer(self, request: OpenRequest, job: Job, merger: AttemptMerger, page: OutputPage) -> None:
        request.catching_up = False
        epoch, cause = max(page.epoch, merger.epoch), page.cause or "no answer of it was kept"
        merger.on_marker(Marker(MarkerKind(page.state.value), job.id, epoch, cause))


def _stream_not_found(job_id: JobId | None) -> JobNotFound:
    return JobNotFound(
        f"the stream {job_id} is not kept any more, or was cancelled because its client was away for too long: send "
        f"the request without {LAST_EVENT_HEADER}",
        param=LAST_EVENT_HEADER,
    )
