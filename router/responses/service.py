"""Responses of the Responses API built from chat completions: converts requests, and serves background responses.

A background response is a persisted chat; its id names the job, so any Router serves it, to its tenant only. How a
response and its events follow from the chat is in :mod:`router.responses.events`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import orjson

from openai_api.chat_chunks import ChatFailure
from openai_api.paths import CHAT_PATH, RESPONSES_PATH
from openai_api.response_jobs import RESPONSE_TOPIC, job_of_response, response_id
from queue_schemas import (
    PERSISTED_STATES,
    BadMessage,
    BadRequest,
    Job,
    JobId,
    MarkerKind,
    NotFound,
    PersistedJob,
    Pool,
    State,
    Tenant,
)
from queue_schemas.persisted_output import digest_of

from ..http.response_head import ResponseHead
from ..http.response_writer import ResponseWriter
from ..inference.open_request import OpenRequest
from ..inference.request_fields import RequestFields, read_fields
from ..inference.rules import ending_error
from ..jobs.persisted_requests import PersistedRequests
from ..jobs.service import JobService
from ..queue_link import QueueLink
from ..settings import RouterSettings
from .chat_only_engines import ChatOnlyEngines
from .chat_request import as_chat
from .events import ResponseEvents
from .json_fields import Json
from .live_merger import LiveResponseMerger
from .persisted_merger import FIRST_ENGINE_EVENT, PersistedResponseMerger
from .saved_request import load_request, save_request
from .schemas import ResponseRequest, input_item_objects, response_object

_JSON = ResponseHead(200, "application/json")


class ResponseService:
    """The responses that one Router builds. A :class:`router.inference.ports.ResponsesMode`.

    Methods with a ``response_id`` raise ``NotFound`` unless it is a background response of the tenant's, and
    ``BrokerUnavailable`` while the queue cannot be reached.
    """

    def __init__(
        self,
        settings: RouterSettings,
        link: QueueLink,
        jobs: JobService,
        persisted: PersistedRequests,
        chat_only: ChatOnlyEngines,
    ) -> None:
        self._settings = settings
        self._link = link
        self._jobs = jobs
        self._persisted = persisted
        self._chat_only = chat_only

    def convert(self, body: bytes, fields: RequestFields, *, keyed: bool, tier: str) -> ResponseFromChat | None:
        """The chat that answers a request for a response; None: the engine is asked for the response itself. ``tier``:
        the service tier that the response names, '' for the one that it asks for.

        An idempotency key means one job, which cannot be sent in another form later: so it is a chat wherever a chat
        can say it. Raises ``BadRequest`` where only a chat will do and none can say it.
        """
        mode = self._settings.responses
        if fields.background or mode == "chat" or (mode == "auto" and fields.model in self._chat_only):
            return self._from_chat(body, tier, background=fields.background)
        if mode == "auto" and keyed:
            try:
                return self._from_chat(body, tier, background=False)
            except BadRequest:
                return None
        return None

    def convert_refused(self, model: Pool, body: bytes, tier: str) -> ResponseFromChat | None:
        """The same after an engine of ``model`` answered that it has no Responses API; None: no chat can say it."""
        try:
            converted = self._from_chat(body, tier, background=False)
        except BadRequest:
            return None
        self._chat_only.add(model)
        return converted

    def live_merger(self, request: ResponseRequest, job: Job, *, stream: bool) -> LiveResponseMerger:
        """What turns the chat of ``job`` into the response that its client waits for."""
        return LiveResponseMerger(
            request,
            stream=stream,
            replay_limit_bytes=self._settings.max_replay_bytes,
            on_loss=job.on_loss,
            persisted=job.persisted,
        )

    async def accept(self, converted: ResponseFromChat, job: Job, request: OpenRequest, writer: ResponseWriter) -> bool:
        """Queue a background response and answer with its object. If its events were asked for: True, and ``request``
        follows them from now on. Raises what :meth:`JobService.enqueue` does."""
        note = save_request(converted.created_at, converted.request)
        enqueue = self._jobs.enqueue(job, converted.fields, notify=RESPONSE_TOPIC, note=note, request=converted.digest)
        enqueued = await request.within_deadline(enqueue)
        if not converted.stream and not job.idempotency_key:
            shown = response_object(converted.of_job(enqueued.job_id), "queued")
        else:
            found = await request.within_deadline(self.find(job.tenant, response_id(enqueued.job_id)))
            if converted.stream:
                self._persisted.follow(request, found, merger=self.events(found))
                return True
            shown = await request.within_deadline(self._object(found))
        await writer.finish(_JSON, orjson.dumps(shown))
        return False

    async def find(self, tenant: Tenant, name: str) -> PersistedJob:
        """The job of the response with the id ``name``."""
        try:
            found = await self._jobs.get(tenant, job_of_response(name))
        except BadMessage:
            found = None
        if found is None or found.topic != RESPONSE_TOPIC:
            raise _not_found(name)
        return found

    async def retrieve(self, tenant: Tenant, name: str) -> Json:
        """The response as it is now; with its output once it has ended."""
        return await self._object(await self.find(tenant, name))

    async def cancel(self, tenant: Tenant, name: str) -> Json:
        """Cancel it unless it has ended. Returns it as it is then."""
        job = await self._jobs.cancel(tenant, (await self.find(tenant, name)).id)
        if job is None:
            raise _not_found(name)
        return await self._object(job)

    async def delete(self, tenant: Tenant, name: str) -> None:
        """Delete it; one that runs is cancelled first."""
        if not await self._jobs.delete(tenant, (await self.find(tenant, name)).id):
            raise _not_found(name)

    async def input_items(self, tenant: Tenant, name: str) -> list[Json]:
        """The items of its request's input, oldest first."""
        job = await self.find(tenant, name)
        request = load_request(job.id, job.metadata.note)
        if "input" not in request.body:
            raise NotFound(f"the input of {name} was too large to be kept beside its answer")
        return input_item_objects(request)

    def events(self, job: PersistedJob, after: int = -1) -> PersistedResponseMerger:
        """What turns the output of ``job`` into the events behind number ``after``.

        Raises ``BadRequest`` if they cannot be those of which the client has the beginning.
        """
        if after >= FIRST_ENGINE_EVENT and (job.output_replaced or not job.output_epoch):
            raise BadRequest(
                "the response was restarted after its worker was lost, and may say something else than the events up "
                "to starting_after: read it without starting_after",
                param="starting_after",
            )
        return PersistedResponseMerger(load_request(job.id, job.metadata.note), after, job.output_epoch)

    def _from_chat(self, body: bytes, tier: str, *, background: bool) -> ResponseFromChat:
        """Raises ``BadRequest`` for what no chat can say."""
        try:
            request: Json = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise BadRequest("a response is asked for in JSON: send a body of that content type") from None
        chat = as_chat(request)
        if tier:
            request = request | {"service_tier": tier}
        fields = read_fields(chat.body, "application/json", CHAT_PATH)
        return ResponseFromChat(self, request, body, int(time.time()), chat.body, fields, chat.stream, background)

    async def _object(self, job: PersistedJob) -> Json:
        request = load_request(job.id, job.metadata.note)
        if not job.over:
            return response_object(request, "queued" if job.state is State.QUEUED else "in_progress")
        events = ResponseEvents(request)
        events.begin()
        async for frame in self._link.ready_queue().output.frames(job.id):
            events.feed(frame)
        if not events.over and job.state in PERSISTED_STATES:
            events.fail(ChatFailure("a part of the answer is not kept any more; send the request again"))
        elif not events.over:
            error = ending_error(MarkerKind(job.state.value), job.cause)
            if job.state is State.CANCELLED:
                events.cancel(error.public)
            else:
                events.fail(ChatFailure(error.public, error.status, error.code))
        return events.response()


@dataclass(frozen=True, slots=True)
class ResponseFromChat:
    """A request for a response, and the chat that answers it. A :class:`router.inference.ports.ChatConversion`.

    ``request`` is what the client sent, parsed, and ``sent`` the same as bytes. ``body``, ``fields``, ``path`` and
    ``content_type`` are the chat's. ``stream``: the client asked for events.
    """

    service: ResponseService
    request: Json
    sent: bytes
    created_at: int
    body: bytes
    fields: RequestFields
    stream: bool
    background: bool
    path: str = CHAT_PATH
    content_type: str = "application/json"

    @property
    def digest(self) -> str:
        """Tells whether two requests are the same: the chat does not contain all that was sent."""
        return digest_of(RESPONSES_PATH, self.content_type, self.sent)

    def of_job(self, job_id: JobId) -> ResponseRequest:
        """The request for the response that ``job_id`` makes."""
        return ResponseRequest(job_id, self.created_at, self.request, self.background)

    def merger(self, job: Job) -> LiveResponseMerger:
        return self.service.live_merger(self.of_job(job.id), job, stream=self.stream)

    async def accept(self, job: Job, request: OpenRequest, writer: ResponseWriter) -> bool:
        return await self.service.accept(self, job, request, writer)


def _not_found(name: str) -> NotFound:
    """The error for a response that is unknown, deleted or another tenant's: the same for all."""
    return NotFound(f"there is no response {name[:60]!r}, or it is not kept any more")
