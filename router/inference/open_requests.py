"""The open requests of one Router: passes frames to the requests that wait for them, and enforces limits on them.

Requests for persisted jobs, which may be many for one job, are in :mod:`router.inference.followers`.
"""

from __future__ import annotations

from collections.abc import Callable

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
    Tenant,
    shard_of_job,
)

from ..metrics import RouterMetrics
from ..settings import RouterSettings
from ..tenant_limits import TenantLimiter, tenant_limit
from .followers import Followers
from .open_request import OpenRequest


def _starts_attempt(item: Frame | Marker) -> bool:
    """Whether an attempt of a job begins, or will: the queue may have lost that the job ended."""
    if type(item) is Frame:
        return bool(item.flags & HEAD) and not item.flags & END
    return type(item) is Marker and item.kind in (MarkerKind.REQUEUED, MarkerKind.LOST)


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
        """Reserve room for a body of which ``size_bytes`` have arrived. Raises ``OverCapacity`` if there is none."""
        more = size_bytes - request.body_bytes
        if more > 0 and request.tenant is not None:
            self._bodies.acquire(request.tenant, more)
            request.body_bytes = size_bytes

    def hold_answer(self, request: OpenRequest, size_bytes: int) -> None:
        """Count an answer that waits for its client among the bodies, until the request is over."""
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

    def deliver(self, items: list[Frame | Marker]) -> None:
        """Pass what came on the reply streams to the requests that wait for it; each is notified once."""
        by_job = self._by_job
        notified: list[OpenRequest] = []
        for item in items:
            request = by_job.get(item.job_id)
            if request is None or request.merger is None:
                if not self.followers.deliver(item):
                    self._metrics.dropped_frames.inc()
                    if request is None and _starts_attempt(item):
                        self._cancel_orphan(item.job_id)
                continue
            merger = request.merger
            request.feed(merger, item)
            if not request.has_news:
                request.has_news = True
                notified.append(request)
            if merger.pending_bytes > self._buffer_bytes and request.sending_since_s < float("inf"):
                request.disconnect_client("slow")
        for request in notified:
            request.notify()

    def lost(self, shard: int) -> None:
        """The reply stream of ``shard`` was lost, with what was on it."""
        for job_id, request in self._by_job.items():
            if shard_of_job(job_id) == shard:
                request.frames_lost = True
                request.notify()
        self.followers.lost(shard)

    def fail_all(self, error: InferqError) -> None:
        """End every open request with ``error``."""
        for request in tuple(self._all):
            request.fail(error)

    def sweep(self, now_s: float) -> None:
        """Enforce every time limit; called each ``sweep_interval_ms``."""
        self.followers.sweep(now_s)
        for request in tuple(self._all):
            if now_s >= request.interrupt_at_s:
                request.time_out()
            elif now_s - request.sending_since_s >= self._stall_s:
                request.disconnect_client("stalled")
            elif now_s >= request.deadline_s + min(self._grace_s, request.client_grace_s):
                request.fail(DeadlineExceeded("the request was not answered in time: the queue was silent until then"))
            elif now_s >= request.resubmit_at_s and request.merger is not None:
                request.resubmit_at_s = float("inf")
                request.merger.gap = not request.merger.closed
                request.notify()
            elif (
                request.merger is not None
                and (request.merger.stream or request.always_event_stream)
                and now_s - request.last_sent_s >= self._keepalive_s
                and request.sending_since_s == float("inf")
            ):
                request.keepalive_due = True
                request.notify()
