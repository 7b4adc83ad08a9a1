"""Persisted jobs of all tenants: queue, get, list, cancel, delete and follow them, from any Router.

All methods raise ``BrokerUnavailable`` while the queue cannot be reached.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, NoReturn

import orjson

from queue_schemas import (
    Enqueued,
    InferqError,
    Job,
    JobNotFound,
    PersistedJob,
    PersistOptions,
    State,
    Tenant,
)
from scheduling.prediction import Place
from telemetry import get_logger

from ..http.connection import Connection
from ..http.response_head import ResponseHead
from ..http.response_writer import ResponseWriter
from ..inference.job_builder import job_metadata_of
from ..inference.open_request import OpenRequest
from ..inference.open_requests import OpenRequests
from ..inference.request_fields import RequestFields
from ..lifecycle import Lifecycle
from ..queue_link import QueueLink
from ..settings import RouterSettings
from .persisted_requests import PersistedRequests
from .schemas import answer_object, job_object

JOBS_PATH = "/v1/jobs"
MAX_SHOWN_BYTES = 4 << 20
"""Largest answer that is shown in a job's object; larger ones are read at /output."""

log = get_logger(__name__)


class JobService:
    """The persisted jobs as one Router reaches them. A :class:`router.inference.ports.BackgroundMode`."""

    def __init__(
        self,
        settings: RouterSettings,
        link: QueueLink,
        requests: OpenRequests,
        persisted: PersistedRequests,
        lifecycle: Lifecycle,
    ) -> None:
        self._settings = settings
        self._link = link
        self._requests = requests
        self._persisted = persisted
        self._lifecycle = lifecycle

    async def accept(self, job: Job, fields: RequestFields, request: OpenRequest, writer: ResponseWriter) -> None:
        """Queue a background job and answer with 202, its address and its object."""
        enqueued = await request.within_deadline(self.enqueue(job, fields))
        found = await request.within_deadline(self._link.ready_queue().persisted_jobs.get(enqueued.job_id))
        if found is None:
            raise JobNotFound(f"the job {enqueued.job_id} was deleted meanwhile")
        writer.add_header(b"location", f"{JOBS_PATH}/{found.id}".encode())
        await writer.finish(ResponseHead(202, "application/json"), orjson.dumps(job_object(found)))

    async def enqueue(
        self, job: Job, fields: RequestFields, *, notify: str = "", note: bytes = b"", request: str = ""
    ) -> Enqueued:
        """Queue a background job: its id and state, or those of the job that holds its idempotency key.

        With a ``notify`` topic, a notice of its end is put where the broker's job notices are read. ``note`` (256 KiB
        at most; it counts among its tenant's kept bytes) comes back as :attr:`PersistedJob.metadata.note`.
        ``request`` is the digest of what the client sent, if the job does not contain all of it. Raises
        ``OverCapacity``, ``BrokerFull``, ``NotOnDisk`` and ``IdempotencyKeyReused``.
        """
        job_metadata = job_metadata_of(job, fields, note=note, request=request)
        options = PersistOptions(self._settings.background_retention_ms, job_metadata, True, notify)
        found = await self._link.ready_queue().jobs.enqueue_persisted(job, options)
        log.info("background_job_queued", job_id=found.job_id, request_id=job.request_id, state=found.state.value)
        return found

    async def get(self, tenant: Tenant, job_id: str) -> PersistedJob | None:
        """A job; None if there is none of that id, or it is not the tenant's."""
        found = await self._link.ready_queue().persisted_jobs.get(job_id)
        return found if found is not None and found.tenant == tenant else None

    async def place(self, job: PersistedJob) -> Place | None:
        """Where a job stands in its queue; None if it does not wait."""
        if job.state is not State.QUEUED:
            return None
        (place,) = await self._link.ready_queue().jobs.places([job.id])
        return place

    async def page(
        self, tenant: Tenant, *, after: str = "", limit: int = 20, states: Iterable[State] = ()
    ) -> tuple[list[PersistedJob], str]:
        """Background jobs of the tenant, newest first, behind the one called ``after``; and the id to go on from, empty
        at the end. Raises ``BadRequest`` if ``after`` is none of them."""
        return await self._link.ready_queue().persisted_jobs.page(tenant, after=after, limit=limit, states=states)

    async def cancel(self, tenant: Tenant, job_id: str) -> PersistedJob | None:
        """Cancel a job unless it has ended. Returns it as it is then, None as :meth:`get`."""
        found = await self.get(tenant, job_id)
        if found is None or found.over:
            return found
        await self._link.ready_queue().jobs.cancel(found.id, "it was cancelled on demand")
        # A job that was not listed leaves nothing when it is cancelled.
        return await self.get(tenant, job_id) or replace(found, state=State.CANCELLED)

    async def delete(self, tenant: Tenant, job_id: str) -> bool:
        """Delete a job and its output; one that runs is cancelled first. False where :meth:`get` returns None."""
        found = await self.get(tenant, job_id)
        if found is None:
            return False
        return await self._link.ready_queue().persisted_jobs.delete(found.id, "it was deleted") is not None

    async def answer(self, job: PersistedJob) -> dict[str, Any] | None:
        """The answer of a job that has one, as JSON; None if a part of it is not kept any more. Raises
        ``JobNotFound``, ``OverCapacity`` and ``ShuttingDown``."""
        pieces, size = [], 0
        async with self.follow(job.tenant, job.id) as output:
            try:
                async for piece in output:
                    size += len(piece)
                    if size > MAX_SHOWN_BYTES:
                        break
                    pieces.append(piece)
            except JobNotFound:
                raise
            except InferqError as error:
                log.info("answer_not_shown", job_id=job.id, code=error.code, error=error.message)
            if output.head is None:
                return None
            return answer_object(output.head, b"".join(pieces) if size <= MAX_SHOWN_BYTES else None)

    @asynccontextmanager
    async def follow(self, tenant: Tenant, job_id: str) -> AsyncIterator[JobOutput]:
        """The answer of a job from its very beginning: first what is kept, then live.

        Any number of readers may follow one job, each at its own pace and in bounded memory. Raises ``JobNotFound``,
        ``OverCapacity`` (this Router serves as many requests as it may) and ``ShuttingDown``.
        """
        self._lifecycle.ensure_accepting()
        job = await self.get(tenant, job_id)
        if job is None:
            raise not_found(job_id)
        request = OpenRequest(Connection(_never_receive), asyncio.get_running_loop().time())
        self._requests.add(request)
        try:
            self._requests.admit(request, tenant)
            self._persisted.follow(request, job)
            yield JobOutput(request, self._persisted, job, self._settings.keepalive_interval_ms / 1000)
        finally:
            self.leave(request)

    def leave(self, request: OpenRequest) -> None:
        """``request``, which followed a job, is over."""
        self._requests.discard(request)
        if request.job is not None and request.merger is not None and not request.merger.settled:
            self._persisted.leave(request, request.job)


class JobOutput:
    """One reader of the answer of a job: iterate over it, within :meth:`JobService.follow`.

    Yields the bytes of the answer in order: of an event stream whole events (but for one of more than 1 MiB, which
    comes in pieces), of a plain answer the body at its end. An empty piece says that nothing came for
    ``keepalive_interval_ms``.
    ``head`` (status, content type) is set with the first piece that is not empty, and at the end. ``job`` is the job as
    it was when the reader came.

    Ends with ``AttemptsExhausted``, ``JobCancelled`` or ``DeadlineExceeded`` if the job ended without an answer,
    ``StreamBroken`` if its stream cannot be continued safely, ``JobNotFound`` if it was deleted meanwhile.
    """

    def __init__(
        self, request: OpenRequest, persisted: PersistedRequests, job: PersistedJob, keepalive_s: float
    ) -> None:
        self.job = job
        self.head: ResponseHead | None = None
        self._request = request
        self._persisted = persisted
        self._keepalive_s = keepalive_s
        self._over = False

    def __aiter__(self) -> JobOutput:
        return self

    async def __anext__(self) -> bytes:
        request, merger = self._request, self._request.merger
        assert merger is not None  # noqa: S101 - set by follow
        while not self._over:
            data = merger.take()
            self.head = merger.head
            if merger.ended:
                self._over = True
            if data:
                return data
            if merger.ended:
                break
            if error := merger.error or request.error:
                self._over = True
                raise error
            if request.catching_up:
                await self._persisted.catch_up(request)
                continue
            try:
                async with asyncio.timeout(self._keepalive_s):
                    await request.wait()
            except TimeoutError:
                return b""
        raise StopAsyncIteration


def not_found(job_id: str) -> JobNotFound:
    """The error for a job that is unknown, deleted or another tenant's: the same for all."""
    return JobNotFound(f"there is no job {job_id[:60]!r}, or it is not kept any more; GET {JOBS_PATH} lists yours")


async def _never_receive() -> NoReturn:
    """``receive`` of a reader that has no connection."""
    await asyncio.Event().wait()
    raise AssertionError("the event is never set")
