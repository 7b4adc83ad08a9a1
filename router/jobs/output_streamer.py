"""Streams a persisted job's output to an HTTP client: first what is kept, then live."""

from __future__ import annotations

import asyncio

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from openai_api.paths import RESPONSES_PATH
from queue_schemas import InferqError, PersistedJob
from telemetry.http.request_context import REQUEST_ID_HEADER

from ..http.bodies import ClientGone
from ..http.connection import Connection
from ..http.response_writer import ResponseWriter
from ..inference.merging.attempt_merger import AttemptMerger
from ..inference.open_request import OpenRequest
from ..inference.open_requests import OpenRequests
from ..inference.relay import Relay
from ..lifecycle import Lifecycle
from ..metrics import RouterMetrics
from .event_ids import Position
from .persisted_requests import PersistedRequests
from .resumable_writer import EventStreamWriter
from .service import JobService


class OutputStreamer:
    """Streams to clients under the limits of any open request: a slow client is cut off."""

    def __init__(
        self,
        requests: OpenRequests,
        persisted: PersistedRequests,
        relay: Relay,
        jobs: JobService,
        lifecycle: Lifecycle,
        metrics: RouterMetrics,
    ) -> None:
        self._requests = requests
        self._persisted = persisted
        self._relay = relay
        self._jobs = jobs
        self._lifecycle = lifecycle
        self._metrics = metrics

    async def stream(
        self, job: PersistedJob, receive: Receive, writer: ResponseWriter, merger: AttemptMerger | None = None
    ) -> None:
        """Write all output of ``job``, past and to come; ``merger``: in another form than it is kept in."""
        connection = Connection(receive)
        request = OpenRequest(connection, asyncio.get_running_loop().time())
        request.always_event_stream = isinstance(writer, EventStreamWriter)
        self._requests.add(request)
        try:
            self._lifecycle.ensure_accepting()
            self._requests.admit(request, job.tenant)
            self._persisted.follow(request, job, merger=merger)
            connection.watch(request.client_disconnected)
            await self._relay.run(request, writer)
        except InferqError as error:
            connection.unwatch()
            await writer.fail(error, mid_event=request.merger is not None and request.merger.mid_event)
        except ClientGone:
            self._metrics.disconnects.labels(request.disconnect_reason).inc()
        finally:
            connection.unwatch()
            self._jobs.leave(request)
        await connection.closed()


class PersistedResponse(Response):
    """The HTTP response with a job's output, as the request itself would have got it.

    ``events``: as an event stream behind ``after``, which the client has. ``merger``: in the form that it makes.
    """

    def __init__(
        self,
        streamer: OutputStreamer,
        job: PersistedJob,
        *,
        events: bool = False,
        after: Position | None = None,
        merger: AttemptMerger | None = None,
    ) -> None:
        super().__init__()
        self._streamer = streamer
        self._job = job
        self._events = events
        self._after = after
        self._merger = merger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":  # the service writes the request's id itself
                headers = [header for header in message["headers"] if header[0] != REQUEST_ID_HEADER]
                message = {**message, "headers": headers}
            await send(message)

        request_id = str(scope["state"]["request_id"]).encode()
        path = self._job.metadata.path
        if self._merger is not None:
            path = RESPONSES_PATH  # what is kept is a chat, and its client reads a response
        writer = (
            EventStreamWriter(send_without_id, request_id, self._after, path)
            if self._events
            else ResponseWriter(send_without_id, request_id, path)
        )
        if self._after is not None and self._after.job_id is not None and isinstance(writer, EventStreamWriter):
            writer.bind_job(self._after.job_id)
        await self._streamer.stream(self._job, receive, writer, self._merger)
