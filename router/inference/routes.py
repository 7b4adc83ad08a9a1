"""The hot path: one inference request from its head to the end of its answer.

Nothing here sets a timer or takes a lock per request, parses a body twice, or goes through a web framework. The one
task besides the request's own waits for the client to leave.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, replace
from functools import partial

from starlette.types import Receive, Scope, Send

from openai_api.paths import RESPONSES_PATH
from queue_schemas import (
    BadRequest,
    BodyTooLarge,
    InferqError,
    Job,
    JobNotFound,
    Lane,
    OnLoss,
    PersistOptions,
    RequestTimeout,
    StreamBroken,
    Tenant,
    new_job_id,
)
from queue_schemas.headers import for_engine
from queue_schemas.persisted_output import request_digest
from telemetry import get_logger, inject, span_for_request, tracing_enabled
from telemetry.http.access import Access
from telemetry.http.content_coding import decoded_body
from telemetry.http.request_context import REQUEST_ID_HEADER, new_request_id, request_id_from

from ..http.api_keys import ApiKeys
from ..http.bodies import ClientGone, read_body
from ..http.connection import Connection
from ..http.response_writer import ResponseWriter
from ..http.rules import IDEMPOTENCY_HEADER, announced_size, check_size, read_idempotency_key
from ..jobs.event_ids import LAST_EVENT_HEADER, Position, find_position
from ..jobs.persisted_requests import PersistedRequests
from ..jobs.resumable_writer import ResumableWriter
from ..jobs.service import PersistedJobs
from ..lifecycle import Lifecycle
from ..metrics import RouterMetrics
from ..queue_link import QueueLink
from ..responses.chat_only_engines import ChatOnly
from ..responses.live import LiveResponse
from ..responses.service import ResponseParams, Responses
from ..settings import RouterSettings
from .attempt_merger import AttemptMerger
from .cancellation import Canceller
from .deadlines import Deadline, find_deadline
from .job_builder import JobBuilder, job_metadata_of
from .open_requests import OpenRequest, OpenRequests, too_long
from .relay import Relay
from .request_fields import RequestFields, read_fields
from .rules import (
    BACKGROUND_HEADER,
    DEADLINE_HEADER,
    ON_LOSS_HEADER,
    RESUMABLE_HEADER,
    read_deadline,
    read_flag,
    read_on_loss,
)

_DEADLINE = DEADLINE_HEADER.encode()
_ON_LOSS = ON_LOSS_HEADER.encode()
_IDEMPOTENCY = IDEMPOTENCY_HEADER.encode()
_BACKGROUND = BACKGROUND_HEADER.encode()
_RESUMABLE = RESUMABLE_HEADER.encode()
_LAST_EVENT = LAST_EVENT_HEADER.encode()
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _InferenceRequest:
    """What one request asks. ``job`` is how: of a ``response`` that is built here, a chat. ``background``: nobody waits
    for it; ``resumable``: its client may come back for the rest of its stream. ``patience_s`` is its deadline's."""

    job: Job
    fields: RequestFields
    background: bool
    resumable: bool
    response: ResponseParams | None
    on_loss: OnLoss
    patience_s: float


class Inference:
    """Serves ``POST`` requests on inference paths."""

    access = Access.CLIENT
    """Who may: :meth:`_admit` asks for the API key before anything is read."""

    def __init__(
        self,
        settings: RouterSettings,
        keys: ApiKeys,
        link: QueueLink,
        requests: OpenRequests,
        canceller: Canceller,
        metrics: RouterMetrics,
        lifecycle: Lifecycle,
        builder: JobBuilder,
        relay: Relay,
        persisted: PersistedRequests,
        jobs: PersistedJobs,
        responses: Responses,
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._link = link
        self._requests = requests
        self._canceller = canceller
        self._metrics = metrics
        self._lifecycle = lifecycle
        self._builder = builder
        self._relay = relay
        self._persisted = persisted
        self._jobs = jobs
        self._responses = responses
        self._loop = asyncio.get_running_loop
        self._chat_only = ChatOnly(lambda: self._loop().time())

    async def serve(self, scope: Scope, receive: Receive, send: Send, path: str) -> None:
        """Answer one request on ``path``, one of the allowlist."""
        if not tracing_enabled():
            await self._serve(scope, receive, send, path, "")
            return
        headers = dict(scope["headers"])
        parent = _traceparent(headers)
        with span_for_request(f"POST {path}", parent) as span:
            status = await self._serve(scope, receive, send, path, inject(parent))
            span.set("http.response.status_code", status)
            if status >= 500:
                span.fail(str(status))

    async def _serve(self, scope: Scope, receive: Receive, send: Send, path: str, trace: str) -> int:
        headers = dict(scope["headers"])
        given_id = headers.get(REQUEST_ID_HEADER)
        request_id = new_request_id() if given_id is None else request_id_from(((REQUEST_ID_HEADER, given_id),))
        exchange = ResponseWriter(send, request_id.encode(), path)
        connection = Connection(receive)
        request = OpenRequest(connection, self._loop().time())
        self._requests.add(request)
        try:
            tenant = self._admit(request, headers)
            body = await self._body(request, decoded_body(receive, scope["headers"]))
            wanted = await self._wanted(path, body, headers, for_engine(scope["headers"]), tenant, request_id, trace)
            request.patience_s = wanted.patience_s
            if wanted.background:
                if await self._accept(wanted, request, exchange):
                    connection.watch(request.on_gone)
                    await self._relay.run(request, exchange)
            else:
                request.stitch = self._stitch(wanted)
                connection.watch(request.on_gone)
                if not wanted.job.persisted:
                    if wanted.job.path == RESPONSES_PATH and self._settings.responses == "auto":
                        request.fallback = partial(self._as_chat, request, wanted)
                    await self._relay.enqueue(request, wanted.job)
                else:
                    request.keep = self._keep(wanted)
                    if wanted.resumable:
                        after = _after(headers, bool(wanted.job.idempotency_key))
                        exchange = ResumableWriter(send, request_id.encode(), after, path)
                    await self._open_persisted(request, wanted.job, exchange)
                await self._relay.run(request, exchange)
        except InferqError as error:
            connection.unwatch()
            log.debug("refused", request_id=request_id, code=error.code, message=error.message)
            unread = isinstance(error, (BodyTooLarge, RequestTimeout))
            await exchange.fail(error, close=unread, mid_event=request.stitch is not None and request.stitch.mid_event)
        except ClientGone:
            self._metrics.disconnects.labels(request.why_gone).inc()
        except Exception:
            connection.unwatch()
            log.exception("request_failed", request_id=request_id, path=path)
            await exchange.fail(InferqError(f"something went wrong here; the log has it under {request_id}"))
        finally:
            connection.unwatch()
            self._leave(request, request_id)
        await connection.closed()
        self._metrics.answered(path, exchange.status)
        return exchange.status

    async def _wanted(
        self,
        path: str,
        body: bytes,
        headers: dict[bytes, bytes],
        engine_headers: dict[str, str],
        tenant: Tenant,
        request_id: str,
        trace: str,
    ) -> _InferenceRequest:
        settings, content_type = self._settings, _content_type(headers)
        fields = read_fields(body, content_type, path, settings.limits_of(tenant))
        background = _BACKGROUND in headers and read_flag(headers[_BACKGROUND], BACKGROUND_HEADER)
        response = None
        key = read_idempotency_key(headers.get(_IDEMPOTENCY))
        if path == RESPONSES_PATH and (fields.background or not background):
            response = self._response(body, fields, keyed=bool(key))
        if response is not None:
            background = response.background
            path, body, content_type = response.path, response.body, response.content_type
            fields = response.fields
        resumable = fields.stream and not background and response is None and self._is_resumable(headers)
        persisted = bool(key) or resumable or background
        asked_stream = fields if response is None else replace(fields, stream=response.stream)
        on_loss = read_on_loss(headers.get(_ON_LOSS), settings.on_loss)
        deadline = self._deadline(headers, asked_stream, background=background, persisted=persisted)
        job = await self._builder.make(
            tenant=tenant,
            path=path,
            body=body,
            content_type=content_type,
            fields=fields,
            deadline=deadline,
            on_loss=on_loss,
            idempotency_key=key,
            persisted=persisted,
            lane=Lane.BACKGROUND if background else Lane.INTERACTIVE,
            request_id=request_id,
            traceparent=trace or _traceparent(headers),
            headers=engine_headers,
        )
        return _InferenceRequest(job, fields, background, resumable, response, on_loss, deadline.patience_s)

    def _response(self, body: bytes, fields: RequestFields, *, keyed: bool) -> ResponseParams | None:
        """A request for a response, if it is to be built from a chat at once. The job of an idempotency key is one job:
        it cannot be asked in another way later, so it is a chat wherever a chat can say it."""
        setting = self._settings.responses
        if fields.background or setting == "chat" or (setting == "auto" and fields.model in self._chat_only):
            return self._responses.read(body, background=fields.background)
        if setting == "auto" and keyed:
            try:
                return self._responses.read(body, background=False)
            except BadRequest:
                return None
        return None

    async def _as_chat(self, request: OpenRequest, wanted: _InferenceRequest) -> bool:
        """Ask for a response again as a chat: the engine has no Responses API. False for what no chat can say: then the
        engine's answer stands."""
        job = wanted.job
        try:
            response = self._responses.read(job.body, background=False)
        except BadRequest:
            return False
        self._chat_only.add(job.model)
        on_loss = "restart" if wanted.on_loss == "continue" and not response.fields.continuable else wanted.on_loss
        chat = replace(
            job,
            id=new_job_id(self._link.ready_queue().shard_of(job.model)),
            path=response.path,
            body=response.body,
            content_type=response.content_type,
            stream=response.fields.stream,
            on_loss=on_loss,
            ttl_ms=max(1, int((request.deadline_s - self._loop().time()) * 1000)),
        )
        log.info("response_built_from_chat", model=job.model, job_id=chat.id, before=job.id, request_id=job.request_id)
        request.stitch = self._responses.live(response, chat)
        await self._relay.enqueue(request, chat)
        return True

    async def _accept(self, wanted: _InferenceRequest, request: OpenRequest, exchange: ResponseWriter) -> bool:
        """Put a request of the background on the queue and say so; True if ``request`` follows it from now on."""
        if wanted.response is not None:
            return await self._responses.accept(wanted.response, wanted.job, request, exchange)
        await self._jobs.accept(wanted.job, wanted.fields, request, exchange)
        return False

    def _stitch(self, wanted: _InferenceRequest) -> AttemptMerger:
        """What makes the answer of the job's attempts."""
        job, fields = wanted.job, wanted.fields
        if wanted.response is not None:
            return self._responses.live(wanted.response, job)
        return AttemptMerger(
            stream=job.stream,
            replay_limit_bytes=self._settings.max_replay_bytes,
            on_loss=job.on_loss,
            usage=fields.usage,
            choices=fields.choices,
            persisted=job.persisted,
        )

    def _is_resumable(self, headers: dict[bytes, bytes]) -> bool:
        """Whether a client may come back for the rest of its stream."""
        if _RESUMABLE in headers:
            return read_flag(headers[_RESUMABLE], RESUMABLE_HEADER)
        return self._settings.resumable_streams

    def _deadline(
        self, headers: dict[bytes, bytes], fields: RequestFields, *, background: bool, persisted: bool
    ) -> Deadline:
        """How long the request may take."""
        settings = self._settings
        if background:
            max_ms = settings.background_deadline_ms
            limit_ms = read_deadline(headers.get(_DEADLINE), fields.timeout_s, max_ms, max_ms)
            return Deadline(limit_ms, f"{limit_ms} ms (at most INFERQ_ROUTER_BACKGROUND_DEADLINE_MS)")
        default_ms, max_ms = settings.default_deadline_ms, settings.max_deadline_ms
        waits = not (fields.stream or persisted)
        return find_deadline(headers, fields.timeout_s, default_ms, max_ms, waits=waits)

    async def _open_persisted(self, request: OpenRequest, job: Job, exchange: ResponseWriter) -> None:
        """Queue a persisted job, or follow the one behind whose event the client wants to go on."""
        if not isinstance(exchange, ResumableWriter):
            await self._persisted.enqueue(request, job, exchange)
            if isinstance(request.stitch, LiveResponse) and request.job is not None:
                request.stitch.name(request.job.id)
            return
        named = exchange.after.job_id if exchange.after is not None else None
        if named is None or job.idempotency_key:
            await self._persisted.enqueue(request, job, exchange)
        else:
            kept = await request.within_deadline(self._link.ready_queue().persisted_jobs.get(named))
            if kept is None or kept.tenant != job.tenant:
                raise _not_kept(named)
            if kept.metadata.request_digest != request_digest(job):
                raise BadRequest(
                    f"{LAST_EVENT_HEADER} names the stream of another request: its path, content type or body was not "
                    "the same",
                    param=LAST_EVENT_HEADER,
                )
            self._persisted.follow(request, kept, job)
        assert request.job is not None  # noqa: S101 - it is enqueued or followed
        if named not in (None, request.job.id):
            raise _not_kept(named)
        exchange.name(request.job.id)

    def _keep(self, wanted: _InferenceRequest) -> PersistOptions:
        """How the answer to a persisted request that somebody waits for is kept. One with a key runs on without him."""
        keyed, settings = bool(wanted.job.idempotency_key), self._settings
        asked = wanted.response.digest if wanted.response is not None and keyed else ""
        job_metadata = job_metadata_of(
            wanted.job, wanted.fields, resumable=wanted.resumable and not keyed, request=asked
        )
        return PersistOptions(
            settings.idempotency_retention_ms if keyed else settings.resumable_retention_ms, job_metadata
        )

    def _admit(self, request: OpenRequest, headers: dict[bytes, bytes]) -> Tenant:
        """What can be judged before the body is read."""
        self._lifecycle.ensure_accepting()
        tenant = self._keys.tenant(headers)
        self._requests.admit(request, tenant)
        announced = announced_size(headers.get(b"content-length"))
        check_size(announced, self._settings.max_body_bytes)
        self._requests.check_body(request, announced)
        return tenant

    async def _body(self, request: OpenRequest, receive: Receive) -> bytes:
        request.guard(float("inf"), too_long)  # the connection ends a body that is silent or slow
        try:
            return await read_body(
                receive, self._settings.max_body_bytes, lambda size: self._requests.take_body(request, size)
            )
        except asyncio.CancelledError:
            if not request.absorb():
                raise
            raise request.error or ClientGone from None
        finally:
            request.unguard()

    def _leave(self, request: OpenRequest, request_id: str) -> None:
        """Whatever happened: nobody waits any more, and a job that goes on has no one to answer to."""
        job, stitch = request.job, request.stitch
        if stitch is not None and (stitch.continued or stitch.compared or type(stitch.error) is StreamBroken):
            self._metrics.interrupted(
                continued=stitch.continued > 0,
                compared=stitch.compared > 0,
                broken=type(stitch.error) is StreamBroken,
            )
        if job is not None and job.persisted:
            self._requests.discard(request)
            if stitch is not None and not stitch.settled:
                self._persisted.leave(request, job)
            return
        if job is not None and stitch is not None and not stitch.settled:
            why = f"client_{request.why_gone}" if request.gone else "abandoned"
            log.info("job_cancelled", job_id=job.id, request_id=request_id, why=why)
            self._canceller.cancel(job.id, "its client went away" if request.gone else "its router gave it up")
            self._metrics.cancelled(why)
        self._requests.discard(request)


def _after(headers: dict[bytes, bytes], keyed: bool) -> Position | None:
    """Behind which event of its stream a client goes on: one that names its job, or of the job of its key."""
    found = find_position(headers.get(_LAST_EVENT, b"").decode("latin-1"))
    return found if found is not None and (keyed or found.job_id) else None


def _not_kept(job_id: str | None) -> JobNotFound:
    return JobNotFound(
        f"the stream {job_id} is not kept any more, or was cancelled because its client was away for too long: send "
        f"the request without {LAST_EVENT_HEADER}",
        param=LAST_EVENT_HEADER,
    )


def _traceparent(headers: dict[bytes, bytes]) -> str:
    """The client's trace; one that is not in the form of W3C Trace Context is to be ignored."""
    given = headers.get(b"traceparent", b"")
    return given.decode() if _TRACEPARENT.fullmatch(given) else ""


def _content_type(headers: dict[bytes, bytes]) -> str:
    """The content type, fit for a header again: a tab may stand wherever a space may."""
    given = headers.get(b"content-type", b"application/json").replace(b"\t", b" ")
    if not (given.isascii() and given.decode("latin-1").isprintable()):
        raise BadRequest("the content-type header has characters that no content type has; send application/json")
    return given.decode()
