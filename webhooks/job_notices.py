"""Turn the notices of ended background responses, which the queue keeps, into webhook events in the file store.

A notice is removed from the queue once its event is stored. After a crash in between, the same notice makes the same
event again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from openai_api.response_jobs import RESPONSE_TOPIC, ResponseStatus, response_id
from queue_schemas import BadRequest, FinishedJob, InferqError, JobId, PersistedJob, State, Tenant
from storage import ObjectStore
from telemetry import get_logger
from telemetry.threads import in_thread

from .delivery_store import DeliveryStore
from .endpoints import Endpoint, EndpointStore
from .events import WebhookEvent
from .metrics import NotifierMetrics

MAX_NOTICES = 100

log = get_logger(__name__)


class FinishedJobsPort(Protocol):
    """:class:`broker.operations.persisted_jobs.PersistedJobs`."""

    async def get(self, job_id: str) -> PersistedJob | None: ...

    async def read_finished(self, limit: int = ...) -> list[FinishedJob]: ...

    async def acknowledge_finished(self, notice_ids: list[str]) -> int: ...


class OutputPort(Protocol):
    """:class:`broker.operations.output.PersistedOutput`."""

    async def response_status(self, job_id: JobId, state: State) -> ResponseStatus: ...


class QueuePort(Protocol):
    """The notifier's side of :class:`broker.Broker`."""

    @property
    def persisted_jobs(self) -> FinishedJobsPort: ...

    @property
    def output(self) -> OutputPort: ...


class ResponseNotices:
    """For one event loop."""

    def __init__(self, store: ObjectStore, metrics: NotifierMetrics) -> None:
        self._endpoint_store = EndpointStore(store)
        self._deliveries = DeliveryStore(store)
        self._metrics = metrics
        self._endpoints: dict[Tenant, list[Endpoint]] = {}
        self.fault = ""
        """Why notices cannot be taken now; empty if they can."""

    async def run(self, queue: Callable[[], QueuePort | None], every_s: float) -> None:
        """Take notices until cancelled; ``queue`` is None while it cannot be reached."""
        while True:
            notices = queue()
            taken = 0
            if notices is not None:
                try:
                    taken = await self.take(notices)
                    self.fault = ""
                except InferqError as error:
                    if error.message != self.fault:
                        log.warning("response_notices_not_taken", error=error.message, then="they are tried again")
                    self.fault = error.message
            if not taken:
                await asyncio.sleep(every_s)

    async def take(self, queue: QueuePort) -> int:
        """Make events of up to ``MAX_NOTICES`` notices; how many there were. Raises errors of the store and the queue;
        notices without an event then stay."""
        notices = await queue.persisted_jobs.read_finished(MAX_NOTICES)
        self._endpoints.clear()  # read again, so that it has every endpoint that existed when these jobs ended
        handled: list[str] = []
        try:
            for notice in notices:
                try:
                    await self._emit(queue, notice)
                except BadRequest as error:  # it would fail the next time too, and others wait behind it
                    log.warning("notice_skipped", job_id=notice.job_id, tenant=notice.tenant, error=error.message)
                handled.append(notice.id)
        finally:
            if handled:
                await queue.persisted_jobs.acknowledge_finished(handled)
        return len(notices)

    async def _emit(self, queue: QueuePort, notice: FinishedJob) -> None:
        if notice.topic != RESPONSE_TOPIC:
            log.debug("notice_of_another_kind", word=notice.topic, job_id=notice.job_id)
            return
        endpoints = await self._endpoints_of(notice.tenant)
        if not any(endpoint.active for endpoint in endpoints):
            return
        if notice.state is State.DONE and await queue.persisted_jobs.get(notice.job_id) is None:
            log.debug("response_is_gone", job_id=notice.job_id)  # deleted meanwhile: it can no longer be retrieved
            return
        status = await queue.output.response_status(notice.job_id, notice.state)
        event = WebhookEvent.of(notice.tenant, f"response.{status}", response_id(notice.job_id), notice.at_ms // 1000)
        if not any(endpoint.subscribes_to(event.type) for endpoint in endpoints):
            return
        if await in_thread(lambda: self._deliveries.emit(event)):
            self._metrics.events.inc()

    async def _endpoints_of(self, tenant: Tenant) -> list[Endpoint]:
        if tenant not in self._endpoints:
            self._endpoints[tenant] = await in_thread(lambda: self._endpoint_store.of(tenant))
        return self._endpoints[tenant]
