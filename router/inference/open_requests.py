"""Open requests: what waits for an answer, and what wakes it.

Each open request is one coroutine, woken through one future: by frames (:meth:`OpenRequests.deliver`, called by the
reader of the reply streams), by the sweep of each second, by a client that went away. Those that wait for a persisted
job, which may be many for one, are in :mod:`router.inference.followers`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from queue_schemas import (
    END,
    HEAD,
    DeadlineExceeded,
    Frame,
    InferqError,
    Job,
    JobId,
    Marker,
    MarkerKind,
    PersistOptions,
    RequestTimeout,
    Tenant,
    shard_of_job,
)
from telemetry import get_logger

from ..http.bodies import ClientGone
from ..http.connection import Connection
from ..metrics import RouterMetrics
from ..settings import RouterSettings
from ..tenant_limits import TenantLimiter, tenant_limit
from .attempt_merger import AttemptMerger
from .followers import Followers

log = get_logger(__name__)
_UNKEPT = PersistOptions(0)
_T = TypeVar("_T")


def too_long() -> InferqError:
    """What a request is told whose time is up."""
    return RequestTimeout("the request took too long; send it again")


def _begins(item: Frame | Marker) -> bool:
    """Whether it says that an attempt of a job begins, or will: the queue may have lost that the job ended."""
    if type(item) is Frame:
        return bool(item.flags & HEAD) and not item.flags & END
    return type(item) is Marker and item.kind in (MarkerKind.REQUEUED, MarkerKind.LOST)


def _not_answered() -> InferqError:
    return DeadlineExceeded("the request's time ran out while Redis did not answer; try again")


class OpenRequest:
    """One request. Times are the event loop's, in seconds; infinity where there is no limit."""

    __slots__ = (
        "begun_s",
        "behind",
        "body_bytes",
        "commented",
        "connection",
        "deadline_s",
        "error",
        "fallback",
        "follows",
        "gone",
        "heard",
        "held",
        "held_back",
        "interrupted",
        "job",
        "keep",
        "keepalive_due",
        "limit_s",
        "looked_s",
        "lost",
        "news",
        "on_limit",
        "patience_s",
        "quiet_since_s",
        "rerun_s",
        "reruns",
        "sending_since_s",
        "stitch",
        "task",
        "tenant",
        "wake",
        "why_gone",
    )

    def __init__(self, connection: Connection, now_s: float) -> None:
        self.connection = connection
        self.begun_s = self.quiet_since_s = now_s
        self.job: Job | None = None
        self.stitch: AttemptMerger | None = None
        self.deadline_s = self.limit_s = self.sending_since_s = self.rerun_s = self.patience_s = float("inf")
        self.on_limit: Callable[[], InferqError] = too_long
        self.error: InferqError | None = None
        self.fallback: Callable[[], Awaitable[bool]] | None = None
        """Asks for the same in another way, if the engine has no such path; False: there is none."""
        self.held_back = b""
        """What has come of an answer that says so."""
        self.tenant: Tenant | None = None
        """Whose it is; None until it is admitted."""
        self.task: asyncio.Task[Any] | None = None
        self.wake: asyncio.Future[None] | None = None
        self.news = self.gone = self.interrupted = self.keepalive_due = self.lost = False
        self.reruns = 0
        self.body_bytes = 0
        self.why_gone = "left"
        # Of a persisted job: whether what is kept of it is to be read first, what came while a page of that was on its
        # way, whether anything came since it was last looked after, and when that was.
        self.behind = self.heard = False
        self.held: list[Frame | Marker] | None = None
        self.looked_s = now_s
        self.keep = _UNKEPT
        """How what it waits for is kept, if it is."""
        self.follows = False
        """It follows a persisted job that it did not put on the queue, and could not put there again."""
        self.commented = False
        """It is answered with an event stream whatever its job is."""

    async def wait(self) -> None:
        """Until there is news; at once if there is some already."""
        if not self.news:
            self.wake = asyncio.get_running_loop().create_future()
            await self.wake
        self.news = False

    def notify(self) -> None:
        """There is news."""
        self.news = True
        wake = self.wake
        if wake is not None:
            self.wake = None
            if not wake.done():
                wake.set_result(None)

    def take_in(self, stitch: AttemptMerger, item: Frame | Marker) -> None:
        """Something of its answer came."""
        try:
            if type(item) is Frame:
                stitch.on_frame(item)
            elif type(item) is Marker:
                stitch.on_marker(item)
        except Exception:  # one answer's fault must not end the reader of all
            log.exception("answer_not_understood", job_id=item.job_id)
            self.fail(InferqError("the answer could not be put together; the router's log says why"))

    def fail(self, error: InferqError) -> None:
        """Answer with ``error``, unless there is an answer or another error already."""
        if self.error is None:
            self.error = error
        self.interrupt()
        self.notify()

    def on_gone(self, why: str = "left") -> None:
        """The client went away, or was cut off; the first reason counts."""
        if not self.gone:
            self.why_gone = why
        self.gone = True
        self.interrupt()
        self.notify()

    def drop(self, why: str) -> None:
        """Cut off the client, which is too slow or stalled."""
        log.warning("client_dropped", why=why, job_id=self.job.id if self.job is not None else "")
        self.sending_since_s = float("inf")
        self.on_gone(why)
        self.connection.cut()

    def give(self, ttl_ms: int) -> None:
        """Its time begins to run, unless it does already."""
        if self.deadline_s == float("inf"):
            self.deadline_s = asyncio.get_running_loop().time() + ttl_ms / 1000

    def guard(self, limit_s: float, on_limit: Callable[[], InferqError]) -> None:
        """From now on the request's task may be interrupted: at ``limit_s`` with the error that ``on_limit`` makes, or
        when the client goes."""
        self.task = asyncio.current_task()
        self.limit_s, self.on_limit = limit_s, on_limit

    def unguard(self) -> None:
        """The end of :meth:`guard`."""
        self.task = None
        self.limit_s = float("inf")

    async def within_deadline(self, call: Awaitable[_T]) -> _T:
        """The answer of a call to the queue, unless the client goes or the request's time runs out before it comes."""
        self.guard(self.deadline_s, _not_answered)
        try:
            return await call
        except asyncio.CancelledError:
            if not self.absorb():
                raise
            raise self.error or ClientGone from None
        finally:
            self.unguard()

    def interrupt(self) -> None:
        """End the wait that :meth:`guard` began, if one is under way; the task gets ``CancelledError``."""
        if self.task is not None and not self.interrupted:
            self.interrupted = True
            self.task.cancel()

    def absorb(self) -> bool:
        """After a ``CancelledError``: whether it was :meth:`interrupt`'s, and is hereby dealt with."""
        task = asyncio.current_task()
        if not self.interrupted or task is None:
            return False
        self.interrupted = False
        return task.uncancel() == 0


class OpenRequests:
    """All open requests of the process."""

    def __init__(
        self,
        settings: RouterSettings,
        metrics: RouterMetrics,
        followers: Followers,
        cancel_orphan: Callable[[JobId], None],
        on_closed: Callable[[], None],
        *,
        single_tenant: bool,
    ) -> None:
        """``followers``: the requests for persisted jobs. ``cancel_orphan`` cancels a job that runs, or will, though
        nobody waits for it. ``on_closed`` is called after each request. ``single_tenant``: there are no other tenants
        to keep room for."""
        self._metrics = metrics
        self.followers = followers
        self._cancel_orphan = cancel_orphan
        self._on_closed = on_closed
        self._running = TenantLimiter(
            settings.max_concurrent_requests,
            tenant_limit(
                settings.max_tenant_concurrent_requests, settings.max_concurrent_requests, single_tenant=single_tenant
            ),
            what="requests",
            setting="max_tenant_concurrent_requests",
        )
        max_bytes = settings.max_inflight_body_bytes
        of_tenant = max(
            settings.max_body_bytes,
            tenant_limit(settings.max_tenant_inflight_body_bytes, max_bytes, single_tenant=single_tenant),
        )
        self._bodies = TenantLimiter(
            max_bytes, of_tenant, what="bytes of bodies", setting="max_tenant_inflight_body_bytes"
        )
        self._buffer_bytes = settings.max_client_buffer_bytes
        self._stall_s = settings.client_stall_timeout_ms / 1000
        self._keepalive_s = settings.keepalive_interval_ms / 1000
        self._grace_s = settings.deadline_grace_ms / 1000
        self._all: set[OpenRequest] = set()
        self._by_job: dict[JobId, OpenRequest] = {}

    def __len__(self) -> int:
        return len(self._all)

    @property
    def waiting(self) -> int:
        """Requests that have a job on the queue."""
        return len(self._by_job) + len(self.followers)

    @property
    def body_bytes(self) -> int:
        """Bytes of the bodies of all open requests, as far as they have arrived, and of answers on their way out."""
        return self._bodies.used

    def now_open(self) -> frozenset[OpenRequest]:
        """The requests that are open at this moment."""
        return frozenset(self._all)

    def add(self, request: OpenRequest) -> None:
        """A request came."""
        self._all.add(request)

    def admit(self, request: OpenRequest, tenant: Tenant) -> None:
        """It is the ``tenant``'s. Raises ``OverCapacity`` if there are too many, of all or of the tenant."""
        self._running.acquire(tenant)
        request.tenant = tenant

    def discard(self, request: OpenRequest) -> None:
        """A request is over."""
        if request in self._all:
            self._all.remove(request)
            if request.tenant is not None:
                self._running.release(request.tenant)
                self._bodies.release(request.tenant, request.body_bytes)
        self._detach(request)
        self._on_closed()

    def check_body(self, request: OpenRequest, announced_bytes: int) -> None:
        """Raise ``OverCapacity`` if there is no room for a body. None is taken: what is announced may never come."""
        if request.tenant is not None:
            self._bodies.check(request.tenant, announced_bytes)

    def take_body(self, request: OpenRequest, size_bytes: int) -> None:
        """Take room for a body of which ``size_bytes`` have arrived. Raises ``OverCapacity`` if there is none."""
        more = size_bytes - request.body_bytes
        if more > 0 and request.tenant is not None:
            self._bodies.acquire(request.tenant, more)
            request.body_bytes = size_bytes

    def hold_answer(self, request: OpenRequest, size_bytes: int) -> None:
        """An answer of so many bytes waits for its client: until it is taken there is less room for bodies."""
        if request.tenant is not None:
            self._bodies.force(request.tenant, size_bytes)
            request.body_bytes += size_bytes

    def attach(self, request: OpenRequest, job: Job) -> None:
        """From now on ``request`` waits for ``job``, and for no other."""
        self._detach(request)
        request.job = job
        if job.persisted:
            self.followers.add(request, job)
        else:
            self._by_job[job.id] = request

    def _detach(self, request: OpenRequest) -> None:
        job = request.job
        if job is not None and job.persisted:
            self.followers.discard(request, job)
        elif job is not None:
            self._by_job.pop(job.id, None)

    def deliver(self, news: list[Frame | Marker]) -> None:
        """Hand what came on the reply streams to whom it concerns."""
        by_job = self._by_job
        for item in news:
            request = by_job.get(item.job_id)
            if request is None or request.stitch is None:
                if not self.followers.deliver(item):
                    self._metrics.dropped_frames.inc()
                    if request is None and _begins(item):
                        self._cancel_orphan(item.job_id)
                continue
            stitch = request.stitch
            request.take_in(stitch, item)
            if not request.news:
                request.notify()
            if stitch.pending_bytes > self._buffer_bytes and request.sending_since_s < float("inf"):
                request.drop("slow")

    def lost(self, shard: int) -> None:
        """The reply stream of ``shard`` was lost: what was on it did not arrive."""
        for job_id, request in self._by_job.items():
            if shard_of_job(job_id) == shard:
                request.lost = True
                request.notify()
        self.followers.lost(shard)

    def fail_all(self, error: InferqError) -> None:
        """End every open request with ``error``."""
        for request in tuple(self._all):
            request.fail(error)

    def sweep(self, now_s: float) -> None:
        """Enforce every limit in time."""
        self.followers.sweep(now_s)
        for request in tuple(self._all):
            if now_s >= request.limit_s:
                request.fail(request.on_limit())
            elif now_s - request.sending_since_s >= self._stall_s:
                request.drop("stalled")
            elif now_s >= request.deadline_s + min(self._grace_s, request.patience_s):
                request.fail(DeadlineExceeded("the request was not answered in time: the queue was silent until then"))
            elif now_s >= request.rerun_s and request.stitch is not None:
                request.rerun_s = float("inf")
                request.stitch.gap = not request.stitch.closed
                request.notify()
            elif (
                request.stitch is not None
                and (request.stitch.stream or request.commented)
                and now_s - request.quiet_since_s >= self._keepalive_s
                and request.sending_since_s == float("inf")
            ):
                request.keepalive_due = True
                request.notify()
