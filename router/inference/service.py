"""Turns one inference request into a job, and has its answer relayed: plain, persisted, background or as a response.

Nothing here sets a timer or takes a lock per request, or parses a body twice.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

from starlette.types import Send

from openai_api.paths import RESPONSES_PATH
from queue_schemas import BadRequest, Enqueued, Job, OnLoss, PersistOptions, StreamBroken, Tenant, new_job_id
from queue_schemas.records import record
from scheduling.cost import OUTPUT_WEIGHT
from scheduling.prediction import patience_ms
from scheduling.service_tiers import used_tier
from telemetry import get_logger
from telemetry.http.content_coding import CONTENT_ENCODING

from ..http.response_writer import ResponseWriter
from ..http.rules import IDEMPOTENCY_HEADER, announced_size, check_size, read_idempotency_key
from ..metrics import RouterMetrics
from ..queue_link import QueueLink
from ..settings import RouterSettings
from .cancellation import Canceller
from .job_builder import JobBuilder, job_metadata_of
from .merging.attempt_merger import AttemptMerger
from .open_request import OpenRequest
from .open_requests import OpenRequests
from .ports import BackgroundMode, ChatConversion, PersistedMode, ResponsesMode
from .relay import Relay
from .request_fields import RequestFields, read_fields
from .rules import (
    BACKGROUND_HEADER,
    DEADLINE_HEADER,
    DO_NOT_QUEUE_HEADER,
    ON_LOSS_HEADER,
    RESUMABLE_HEADER,
    SESSION_HEADER,
    Deadline,
    background_deadline,
    find_deadline,
    read_flag,
    read_on_loss,
)

_DEADLINE = DEADLINE_HEADER.encode()
_ON_LOSS = ON_LOSS_HEADER.encode()
_IDEMPOTENCY = IDEMPOTENCY_HEADER.encode()
_BACKGROUND = BACKGROUND_HEADER.encode()
_RESUMABLE = RESUMABLE_HEADER.encode()
_DO_NOT_QUEUE = DO_NOT_QUEUE_HEADER.encode()
_LAST_EVENT = b"last-event-id"
_SESSION = SESSION_HEADER.encode()
_UNUSUAL = frozenset({CONTENT_ENCODING, _IDEMPOTENCY, _BACKGROUND, _RESUMABLE})
"""Headers of requests that wait for more than their answer."""

log = get_logger(__name__)


@record
class InferenceRequest:
    """One request as the client sent it, and the headers that are passed to the engine."""

    path: str
    body: bytes
    content_type: str
    headers: dict[bytes, bytes]
    engine_headers: dict[str, str]
    request_id: str
    traceparent: str


@record
class PreparedRequest:
    """One request with the job that answers it. ``background``: no client waits; ``resumable``: its client may come
    back for the rest of its stream; ``conversion``: the job is a chat whose answer becomes a response; ``tier``:
    the service tier that it has, '' if it named none."""

    job: Job
    fields: RequestFields
    background: bool
    resumable: bool
    conversion: ChatConversion | None
    on_loss: OnLoss
    client_grace_s: float
    last_event_id: bytes
    tier: str
    patience_ms: int | None
    """How long it may have to wait, by prediction, to be taken in; 0: not at all; None: for any time."""


class InferenceService:
    """Serves inference requests: :meth:`admit`, :meth:`prepare`, :meth:`answer`, and :meth:`leave` at the end."""

    def __init__(
        self,
        settings: RouterSettings,
        link: QueueLink,
        requests: OpenRequests,
        canceller: Canceller,
        metrics: RouterMetrics,
        builder: JobBuilder,
        relay: Relay,
        persisted: PersistedMode,
        background: BackgroundMode,
        responses: ResponsesMode,
    ) -> None:
        self._settings = settings
        self._link = link
        self._requests = requests
        self._canceller = canceller
        self._metrics = metrics
        self._builder = builder
        self._relay = relay
        self._persisted = persisted
        self._background = background
        self._responses = responses
        self._loop = asyncio.get_running_loop

    def admit(self, request: OpenRequest, tenant: Tenant, headers: dict[bytes, bytes]) -> None:
        """Check what can be checked before the body is read. Raises ``OverCapacity`` and ``BodyTooLarge``."""
        self._requests.admit(request, tenant)
        announced = announced_size(headers.get(b"content-length"))
        check_size(announced, self._settings.max_body_bytes)
        self._requests.check_body(request, announced)

    async def prepare(self, received: InferenceRequest, tenant: Tenant) -> PreparedRequest:
        """The job that answers a request. Raises ``BadRequest``, ``ModelNotFound``, ``NoWorker`` and
        ``BrokerUnavailable``."""
        prepared = self.prepare_now(received, tenant)
        if not self._builder.knows(prepared.job.model):
            await self._builder.find(prepared.job.model)
            prepared = self.prepare_now(received, tenant)  # the connection to the queue may be another one now
        return prepared

    def prepare_now(self, received: InferenceRequest, tenant: Tenant) -> PreparedRequest:
        """The same, without a look whether anything serves the model. Raises ``BadRequest`` and
        ``BrokerUnavailable``."""
        settings, headers = self._settings, received.headers
        path, body, content_type = received.path, received.body, received.content_type
        affinity_of = tenant if settings.affinity else ""
        fields = read_fields(body, content_type, path, settings.limits_of(tenant), affinity_of, headers.get(_SESSION))
        affinity = fields.affinity
        background = _BACKGROUND in headers and read_flag(headers[_BACKGROUND], BACKGROUND_HEADER)
        key = read_idempotency_key(headers.get(_IDEMPOTENCY))
        tier = used_tier(fields.tier, settings.highest_band_of(tenant)) if fields.tier else ""
        conversion = None
        if path == RESPONSES_PATH and (fields.background or not background):
            conversion = self._responses.convert(body, fields, keyed=bool(key), tier=tier)
        client_streams = fields.stream
        if conversion is not None:
            background, client_streams = conversion.background, conversion.stream
            path, body, content_type = conversion.path, conversion.body, conversion.content_type
            fields = conversion.fields
        resumable = fields.stream and not background and conversion is None and self._is_resumable(headers)
        persisted = bool(key) or resumable or background
        on_loss = read_on_loss(headers.get(_ON_LOSS), settings.on_loss)
        deadline = self._deadline(headers, fields.timeout_s, client_streams, background=background, persisted=persisted)
        job = self._builder.build(
            tenant=tenant,
            path=path,
            body=body,
            content_type=content_type,
            fields=fields,
            deadline=deadline,
            on_loss=on_loss,
            idempotency_key=key,
            persisted=persisted,
            background=background,
            tier=tier,
            request_id=received.request_id,
            traceparent=received.traceparent,
            headers=received.engine_headers,
            affinity=affinity,
        )
        return PreparedRequest(
            job,
            fields,
            background,
            resumable,
            conversion,
            on_loss,
            deadline.client_grace_s,
            headers.get(_LAST_EVENT, b""),
            tier,
            self._patience_ms(headers, deadline, background=background),
        )

    def resumable_writer(self, prepared: PreparedRequest, send: Send, request_id: bytes, path: str) -> ResponseWriter:
        """The writer for a resumable stream."""
        return self._persisted.resumable_writer(
            send, request_id, path, prepared.last_event_id, keyed=bool(prepared.job.idempotency_key)
        )

    def may_be_direct(self, path: str, headers: dict[bytes, bytes]) -> bool:
        """Whether :meth:`is_direct` can be: before anything is read that is read again otherwise."""
        return path != RESPONSES_PATH and _UNUSUAL.isdisjoint(headers)

    def is_direct(self, prepared: PreparedRequest) -> bool:
        """Whether :meth:`begin` can answer what :meth:`may_be_direct`: it is ordinary, and its model is known."""
        return not prepared.job.persisted and self._builder.knows(prepared.job.model)

    def begin(self, request: OpenRequest, prepared: PreparedRequest) -> asyncio.Future[Enqueued]:
        """Put the job of an ordinary request on the queue, without waiting. Raises ``BrokerUnavailable``."""
        request.client_grace_s, request.patience_ms = prepared.client_grace_s, prepared.patience_ms
        request.merger = self._merger(prepared)
        request.connection.watch(request.client_disconnected)
        return self._relay.begin(request, prepared.job)

    async def answer(self, request: OpenRequest, prepared: PreparedRequest, writer: ResponseWriter) -> None:
        """Put the job on the queue and relay its answer to its end. Raises ``ClientGone``, and the error to answer."""
        request.client_grace_s, request.patience_ms = prepared.client_grace_s, prepared.patience_ms
        job = prepared.job
        if prepared.background:
            if not await self._accept(prepared, request, writer):
                return
            request.connection.watch(request.client_disconnected)
        else:
            request.merger = self._merger(prepared)
            request.connection.watch(request.client_disconnected)
            if job.persisted:
                request.persist_options = self._persist_options(prepared)
                await self._persisted.start(request, job, writer)
            else:
                if job.path == RESPONSES_PATH and self._settings.responses == "auto":
                    request.fallback = partial(self._retry_as_chat, request, prepared)
                await self._relay.enqueue(request, job)
        await self._relay.run(request, writer)

    def leave(self, request: OpenRequest, request_id: str) -> None:
        """``request`` is over, however: its job is cancelled, or runs on if it is persisted."""
        job, merger = request.job, request.merger
        if merger is not None and (merger.continued or merger.compared or type(merger.error) is StreamBroken):
            self._metrics.interrupted(
                continued=merger.continued > 0,
                compared=merger.compared > 0,
                broken=type(merger.error) is StreamBroken,
            )
        self._requests.discard(request)
        if job is None or merger is None or merger.settled:
            return
        if job.persisted:
            self._persisted.leave(request, job)
            return
        why = f"client_{request.disconnect_reason}" if request.disconnected else "abandoned"
        log.info("job_cancelled", job_id=job.id, request_id=request_id, why=why)
        reason = "its client went away" if request.disconnected else "its Router abandoned it"
        self._canceller.cancel(job.id, reason, OUTPUT_WEIGHT * merger.events)
        self._metrics.cancelled(why)

    async def _accept(self, prepared: PreparedRequest, request: OpenRequest, writer: ResponseWriter) -> bool:
        """Queue a background request and answer with its object; True if ``request`` follows it from now on."""
        if prepared.conversion is not None:
            return await prepared.conversion.accept(prepared.job, request, writer)
        await self._background.accept(prepared.job, prepared.fields, request, writer)
        return False

    async def _retry_as_chat(self, request: OpenRequest, prepared: PreparedRequest) -> bool:
        """Send a request for a response again as a chat: the engine has no Responses API. False if no chat can say it:
        then the engine's answer stands."""
        job = prepared.job
        conversion = self._responses.convert_refused(job.model, job.body, prepared.tier)
        if conversion is None:
            return False
        on_loss = prepared.on_loss
        if on_loss == "continue" and not conversion.fields.continuable:
            on_loss = "restart"
        chat = replace(
            job,
            id=new_job_id(self._link.ready_queue().shard_of(job.model)),
            path=conversion.path,
            body=conversion.body,
            content_type=conversion.content_type,
            stream=conversion.fields.stream,
            on_loss=on_loss,
            ttl_ms=max(1, int((request.deadline_s - self._loop().time()) * 1000)),
        )
        log.info(
            "response_built_from_chat", model=job.model, job_id=chat.id, previous=job.id, request_id=job.request_id
        )
        request.merger = conversion.merger(chat)
        await self._relay.enqueue(request, chat)
        return True

    def _merger(self, prepared: PreparedRequest) -> AttemptMerger:
        job, fields = prepared.job, prepared.fields
        if prepared.conversion is not None:
            return prepared.conversion.merger(job)
        return AttemptMerger(
            stream=job.stream,
            replay_limit_bytes=self._settings.max_replay_bytes,
            on_loss=job.on_loss,
            usage=fields.usage,
            choices=fields.choices,
            persisted=job.persisted,
        )

    def _patience_ms(self, headers: dict[bytes, bytes], deadline: Deadline, *, background: bool) -> int | None:
        if _DO_NOT_QUEUE in headers and read_flag(headers[_DO_NOT_QUEUE], DO_NOT_QUEUE_HEADER):
            if background:
                raise BadRequest(
                    f"a background request waits in the queue: leave out {DO_NOT_QUEUE_HEADER}, or {BACKGROUND_HEADER}",
                    param=DO_NOT_QUEUE_HEADER,
                )
            return 0
        if background or self._settings.admission == "off":
            return None
        return patience_ms(deadline.limit_ms, self._settings.admission_margin)

    def _is_resumable(self, headers: dict[bytes, bytes]) -> bool:
        if _RESUMABLE in headers:
            return read_flag(headers[_RESUMABLE], RESUMABLE_HEADER)
        return self._settings.resumable_streams

    def _deadline(
        self, headers: dict[bytes, bytes], timeout_s: float | None, streams: bool, *, background: bool, persisted: bool
    ) -> Deadline:
        settings = self._settings
        if background:
            return background_deadline(headers.get(_DEADLINE), timeout_s, settings.background_deadline_ms)
        default_ms, max_ms = settings.default_deadline_ms, settings.max_deadline_ms
        return find_deadline(headers, timeout_s, default_ms, max_ms, waits=not (streams or persisted))

    def _persist_options(self, prepared: PreparedRequest) -> PersistOptions:
        """How long the output of a persisted job is kept that a client waits for."""
        keyed, settings = bool(prepared.job.idempotency_key), self._settings
        digest = prepared.conversion.digest if prepared.conversion is not None and keyed else ""
        job_metadata = job_metadata_of(
            prepared.job, prepared.fields, resumable=prepared.resumable and not keyed, request=digest
        )
        return PersistOptions(
            settings.idempotency_retention_ms if keyed else settings.resumable_retention_ms, job_metadata
        )
