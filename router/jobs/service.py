"""Persisted jobs: requests of the background, whose answers anybody of their tenant may read, from any Router, as often
as
wanted, until they are forgotten.

:class:`PersistedJobs` is the way to them for whatever else the Router offers over such jobs:
:meth:`PersistedJobs.submit` puts one on the queue, :meth:`PersistedJobs.follow` gives its answer from its beginning,
:meth:`PersistedJobs.status`, :meth:`PersistedJobs.cancel` and :meth:`PersistedJobs.delete` do what they say. All
methods raise ``BrokerUnavailable`` while the queue cannot be reached.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import NoReturn

import orjson

from queue_schemas import (
    Enqueued,
    Job,
    JobNotFound,
    Lane,
    OnLoss,
    PersistedJob,
    PersistOptions,
    State,
    Tenant,
)
from telemetry import get_logger

from ..http.connection import Connection
from ..http.response_head import ResponseHead
from ..http.response_writer import ResponseWriter
from ..inference.deadlines import Deadline
from ..inference.job_builder import JobBuilder, job_metadata_of
from ..inference.open_requests import OpenRequest, OpenRequests
from ..inference.request_fields import RequestFields, read_fields
from ..inference.rules import read_deadline
from ..lifecycle import Lifecycle
from ..queue_link import QueueLink
from ..settings import RouterSettings
from .persisted_requests import PersistedRequests
from .schemas import job_object

JOBS_PATH = "/v1/jobs"

log = get_logger(__name__)


class PersistedJobs:
    """The persisted jobs of all tenants, as this Router reaches them."""

    def __init__(
        self,
        settings: RouterSettings,
        link: QueueLink,
        requests: OpenRequests,
        persisted: PersistedRequests,
        builder: JobBuilder,
        lifecycle: Lifecycle,
    ) -> None:
        self._settings = settings
        self._link = link
        self._requests = requests
        self._persisted = persisted
        self._builder = builder
        self._lifecycle = lifecycle

    async def submit(
        self,
        *,
        tenant: Tenant,
        path: str,
        body: bytes,
        content_type: str = "application/json",
        deadline_ms: int | None = None,
        keep_ms: int | None = None,
        on_loss: OnLoss | None = None,
        idempotency_key: str = "",
        request_id: str = "",
        traceparent: str = "",
        notify: str = "",
        note: bytes = b"",
    ) -> Enqueued:
        """Put a background request on the queue: its job's id, or that of the one that holds its idempotency key.

        ``path``, ``body`` and ``content_type`` are what the engine gets; model, ``stream`` and ``priority`` are read
        from the body. It may take ``deadline_ms`` (setting ``background_deadline_ms``) and is kept for ``keep_ms``
        (setting ``background_retention_ms``) once it has ended, however. ``note`` (256 KiB at most; it counts among its
        tenant's kept bytes) comes back as :attr:`PersistedJob.job_metadata.note`. With a ``notify`` word, a notice of
        its end is put where ``broker.persisted_jobs.read_finished`` finds it.

        Raises ``BadRequest``, ``ModelNotFound``, ``NoWorker``, ``OverCapacity``, ``BrokerFull``, ``NotOnDisk``,
        ``IdempotencyKeyReused`` and ``ShuttingDown``.
        """
        self._lifecycle.ensure_accepting()
        settings = self._settings
        fields = read_fields(body, content_type, path, settings.limits_of(tenant))
        max_ms = settings.background_deadline_ms
        limit_ms = read_deadline(None, fields.timeout_s, min(deadline_ms or max_ms, max_ms), max_ms)
        job = await self._builder.make(
            tenant=tenant,
            path=path,
            body=body,
            content_type=content_type,
            fields=fields,
            deadline=Deadline(limit_ms, f"{limit_ms} ms"),
            on_loss=on_loss or settings.on_loss,
            idempotency_key=idempotency_key,
            persisted=True,
            lane=Lane.BACKGROUND,
            request_id=request_id,
            traceparent=traceparent,
        )
        return await self.enqueue(job, fields, keep_ms=keep_ms, notify=notify, note=note)

    async def accept(self, job: Job, fields: RequestFields, request: OpenRequest, exchange: ResponseWriter) -> None:
        """Put the background request on the queue and say where it is: 202 with its object."""
        found = await request.within_deadline(self.enqueue(job, fields))
        kept = await request.within_deadline(self._link.ready_queue().persisted_jobs.get(found.job_id))
        if kept is None:
            raise JobNotFound(f"the job {found.job_id} was deleted meanwhile")
        exchange.add_header(b"location", f"{JOBS_PATH}/{kept.id}".encode())
        await exchange.finish(ResponseHead(202, "application/json"), orjson.dumps(job_object(kept)))

    async def status(self, tenant: Tenant, job_id: str) -> PersistedJob | None:
        """What may be told of a job; None if there is none of that id, or it is not the tenant's."""
        kept = await self._link.ready_queue().persisted_jobs.get(job_id)
        return kept if kept is not None and kept.tenant == tenant else None

    async def jobs(
        self, tenant: Tenant, *, after: str = "", limit: int = 20, states: Iterable[State] = ()
    ) -> tuple[list[PersistedJob], str]:
        """A page of the tenant's background jobs, newest first, behind the one called ``after``; and the id to go on
        from, empty at the end. Raises ``BadRequest`` if ``after`` is none of them."""
        return await self._link.ready_queue().persisted_jobs.page(tenant, after=after, limit=limit, states=states)

    async def cancel(self, tenant: Tenant, job_id: str) -> PersistedJob | None:
        """Cancel a job, which may have ended already; what is to be told of it then, None as for :meth:`status`."""
        kept = await self.status(tenant, job_id)
        if kept is None or kept.over:
            return kept
        await self._link.ready_queue().jobs.cancel(kept.id, "it was cancelled on demand")
        # A job that was not listed leaves nothing when it is cancelled.
        return await self.status(tenant, job_id) or replace(kept, state=State.CANCELLED)

    async def delete(self, tenant: Tenant, job_id: str) -> bool:
        """Forget all that is kept of a job, which is cancelled first if it lives; False if there is none, as for
        :meth:`status`."""
        kept = await self.status(tenant, job_id)
        return (
            kept is not None
            and await self._link.ready_queue().persisted_jobs.delete(kept.id, "it was deleted") is not None
        )

    @asynccontextmanager
    async def follow(self, tenant: Tenant, job_id: str) -> AsyncIterator[Followed]:
        """The answer of a job from its very beginning, as its client would get it: first what is kept, then live.

        Any number of readers may follow one job, each at its own pace and in bounded memory. Raises ``JobNotFound``,
        ``OverCapacity`` (this Router serves as many requests as it may) and ``ShuttingDown``.
        """
        self._lifecycle.ensure_accepting()
        requests = self._requests
        kept = await self.status(tenant, job_id)
        if kept is None:
            raise not_found(job_id)
        request = OpenRequest(Connection(_silence), asyncio.get_running_loop().time())
        requests.add(request)
        try:
            requests.admit(request, tenant)
            self._persisted.follow(request, kept)
            yield Followed(request, self._persisted, kept, self._settings.keepalive_interval_ms / 1000)
        finally:
            self.leave(request)

    def leave(self, request: OpenRequest) -> None:
        """A follower is over."""
        self._requests.discard(request)
        if request.job is not None and request.stitch is not None and not request.stitch.settled:
            self._persisted.leave(request, request.job)

    async def enqueue(
        self,
        job: Job,
        fields: RequestFields,
        *,
        keep_ms: int | None = None,
        notify: str = "",
        note: bytes = b"",
        request: str = "",
    ) -> Enqueued:
        """Put a background job that was made already on the queue; as :meth:`submit` otherwise. ``request`` is the
        digest of what its client asked, if the job does not say all of it."""
        job_metadata = job_metadata_of(job, fields, note=note, request=request)
        keep = PersistOptions(keep_ms or self._settings.background_retention_ms, job_metadata, True, notify)
        found = await self._link.ready_queue().jobs.enqueue_persisted(job, keep)
        log.info("job_kept", job_id=found.job_id, request_id=job.request_id, state=found.state.value)
        return found


class Followed:
    """One reader's way along the answer of a job: iterate over it, within :meth:`PersistedJobs.follow`.

    Yields the bytes of the answer in order: of an event stream whole events (but for one of more than 1 MiB, which
    comes in pieces), of a plain answer the body at its end. An empty piece says that nothing came for
    ``keepalive_interval_ms``.
    ``head`` (status, content type) is set with the first piece that is not empty, and at the end. ``job`` is the job as
    it was when the reader came.

    Ends with ``AttemptsExhausted``, ``JobCancelled`` or ``DeadlineExceeded`` if the job ended without an answer,
    ``StreamBroken`` if its stream cannot be given truthfully, ``JobNotFound`` if it was forgotten meanwhile.
    """

    def __init__(self, request: OpenRequest, stored: PersistedRequests, job: PersistedJob, keepalive_s: float) -> None:
        self.job = job
        self.head: ResponseHead | None = None
        self._request = request
        self._stored = stored
        self._keepalive_s = keepalive_s
        self._over = False

    def __aiter__(self) -> Followed:
        return self

    async def __anext__(self) -> bytes:
        request, stitch = self._request, self._request.stitch
        assert stitch is not None  # noqa: S101 - set by follow
        while not self._over:
            data = stitch.take()
            self.head = stitch.head
            if stitch.ended:
                self._over = True
            if data:
                return data
            if stitch.ended:
                break
            if error := stitch.error or request.error:
                self._over = True
                raise error
            if request.behind:
                await self._stored.catch_up(request)
                continue
            try:
                async with asyncio.timeout(self._keepalive_s):
                    await request.wait()
            except TimeoutError:
                return b""
        raise StopAsyncIteration


def not_found(job_id: str) -> JobNotFound:
    """What is said of a job that is unknown, forgotten or another tenant's: the same."""
    return JobNotFound(f"there is no job {job_id[:60]!r}, or it is not kept any more; GET {JOBS_PATH} lists yours")


async def _silence() -> NoReturn:
    """The connection of a reader that has none."""
    await asyncio.Event().wait()
    raise AssertionError("nobody sets it")
