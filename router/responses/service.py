"""Background responses: kept chats, told as responses of the Responses API.

What a response is, and its events, is in :mod:`router.core.responses`; here is the way to its job and to what is kept
of it. A response is the job's by its id, so any Router can tell of it, and nobody but its tenant is told.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import orjson

from openai_api.chat_chunks import ChatFailure
from openai_api.paths import CHAT_PATH, RESPONSES_PATH
from openai_api.response_jobs import job_of_response, response_id
from queue_schemas import (
    PERSISTED_STATES,
    BadMessage,
    BadRequest,
    Job,
    JobId,
    MarkerKind,
    NotFound,
    PersistedJob,
    State,
    Tenant,
)
from queue_schemas.persisted_output import digest_of

from ..http.response_head import ResponseHead
from ..http.response_writer import ResponseWriter
from ..inference.attempt_merger import ending_error
from ..inference.open_requests import OpenRequest
from ..inference.request_fields import RequestFields, read_fields
from ..jobs.persisted_requests import PersistedRequests
from ..jobs.service import PersistedJobs
from ..queue_link import QueueLink
from ..settings import RouterSettings
from .attempt_merger import FIRST_SAID, ResponseMerger
from .events import ResponseEvents
from .fields import Json
from .live import LiveResponse
from .note import read_note, write_note
from .request import as_chat
from .schemas import Asked, listed_input, response_object

NOTIFY = "response"
"""The word of the notices of responses' ends."""
_OBJECT = ResponseHead(200, "application/json")


@dataclass(frozen=True, slots=True)
class ResponseParams:
    """A request for a response that is built from a chat. ``path``, ``body`` and ``fields`` are the chat's; ``stream``
    is whether the client asked for events, ``request`` what it sent, and ``sent`` the same as bytes."""

    request: Json
    created_at: int
    body: bytes
    fields: RequestFields
    stream: bool
    background: bool
    sent: bytes
    path: str = CHAT_PATH
    content_type: str = "application/json"

    @property
    def digest(self) -> str:
        """What tells another request under the same idempotency key: a chat does not say all that was asked."""
        return digest_of(RESPONSES_PATH, self.content_type, self.sent)

    def of_job(self, job_id: JobId) -> Asked:
        """What is known of the response that ``job_id`` makes."""
        return Asked(job_id, self.created_at, self.request, self.background)


class Responses:
    """The responses that are built here. Its methods raise ``NotFound`` for what is no background response of the
    tenant's, and ``BrokerUnavailable`` while the queue cannot be reached."""

    def __init__(
        self, settings: RouterSettings, link: QueueLink, jobs: PersistedJobs, persisted: PersistedRequests
    ) -> None:
        self._settings = settings
        self._link = link
        self._jobs = jobs
        self._persisted = persisted

    def read(self, body: bytes, *, background: bool) -> ResponseParams:
        """What a Responses request asks, as a chat. Raises ``BadRequest`` for what no chat can say."""
        try:
            request: Json = orjson.loads(body)
        except orjson.JSONDecodeError:
            raise BadRequest("a response is asked for in JSON: send a body of that content type") from None
        chat = as_chat(request)
        fields = read_fields(chat.body, "application/json", CHAT_PATH)
        return ResponseParams(request, int(time.time()), chat.body, fields, chat.stream, background, body)

    def live(self, asked: ResponseParams, job: Job) -> LiveResponse:
        """The answer to one that is waited for."""
        return LiveResponse(
            asked.of_job(job.id),
            stream=asked.stream,
            replay_limit_bytes=self._settings.max_replay_bytes,
            on_loss=job.on_loss,
            persisted=job.persisted,
        )

    async def accept(self, asked: ResponseParams, job: Job, request: OpenRequest, exchange: ResponseWriter) -> bool:
        """Put a background response on the queue and answer with its object. If its events were asked for: True, and
        ``request`` follows them from now on. Raises what :meth:`PersistedJobs.enqueue` does."""
        note = write_note(asked.created_at, asked.request)
        enqueued = self._jobs.enqueue(job, asked.fields, notify=NOTIFY, note=note, request=asked.digest)
        found = await request.within_deadline(enqueued)
        if not asked.stream and not job.idempotency_key:
            shown = response_object(asked.of_job(found.job_id), "queued")
        else:
            kept = await request.within_deadline(self.find(job.tenant, response_id(found.job_id)))
            if asked.stream:
                self._persisted.follow(request, kept, stitch=self.events(kept))
                return True
            shown = await request.within_deadline(self._shown(kept))
        await exchange.finish(_OBJECT, orjson.dumps(shown))
        return False

    async def find(self, tenant: Tenant, name: str) -> PersistedJob:
        """The job of a response."""
        try:
            kept = await self._jobs.status(tenant, job_of_response(name))
        except BadMessage:
            kept = None
        if kept is None or kept.topic != NOTIFY:
            raise _not_found(name)
        return kept

    async def retrieve(self, tenant: Tenant, name: str) -> Json:
        """The response as it is now; with what was said once it has ended."""
        return await self._shown(await self.find(tenant, name))

    async def cancel(self, tenant: Tenant, name: str) -> Json:
        """End it, and tell how it stands then; one that has ended stays as it is."""
        kept = await self._jobs.cancel(tenant, (await self.find(tenant, name)).id)
        if kept is None:
            raise _not_found(name)
        return await self._shown(kept)

    async def delete(self, tenant: Tenant, name: str) -> None:
        """Forget it; one that lives is cancelled first."""
        if not await self._jobs.delete(tenant, (await self.find(tenant, name)).id):
            raise _not_found(name)

    async def input_items(self, tenant: Tenant, name: str) -> list[Json]:
        """What was asked, oldest first."""
        kept = await self.find(tenant, name)
        asked = read_note(kept.id, kept.metadata.note)
        if "input" not in asked.request:
            raise NotFound(f"the input of {name} was too large to be kept beside its answer")
        return listed_input(asked)

    def events(self, kept: PersistedJob, after: int = -1) -> ResponseMerger:
        """What makes the events behind number ``after`` of its job's frames.

        Raises ``BadRequest`` if they cannot be those of which the client has the beginning.
        """
        if after >= FIRST_SAID and (kept.output_replaced or not kept.output_epoch):
            raise BadRequest(
                "the response was begun anew after its worker was lost, and may say something else than the events up "
                "to starting_after: read it without starting_after",
                param="starting_after",
            )
        return ResponseMerger(read_note(kept.id, kept.metadata.note), after, kept.output_epoch)

    async def _shown(self, kept: PersistedJob) -> Json:
        asked = read_note(kept.id, kept.metadata.note)
        if not kept.over:
            return response_object(asked, "queued" if kept.state is State.QUEUED else "in_progress")
        made = ResponseEvents(asked)
        made.begin()
        async for frame in self._link.ready_queue().output.frames(kept.id):
            made.feed(frame)
        if not made.over and kept.state in PERSISTED_STATES:
            made.fail(ChatFailure("a part of the answer is not kept any more; send the request again"))
        elif not made.over:
            error = ending_error(MarkerKind(kept.state.value), kept.cause)
            if kept.state is State.CANCELLED:
                made.cancel(error.public)
            else:
                made.fail(ChatFailure(error.public, error.status, error.code))
        return made.response()


def _not_found(name: str) -> NotFound:
    """What is said of a response that is unknown, forgotten or another tenant's: the same."""
    return NotFound(f"there is no response {name[:60]!r}, or it is not kept any more")
