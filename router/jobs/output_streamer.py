"""Giving what is kept of a job to a client, over HTTP: what there is, then what comes."""

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
from ..inference.attempt_merger import AttemptMerger
from ..inference.open_requests import OpenRequest, OpenRequests
from ..inference.relay import Relay
from ..lifecycle import Lifecycle
from ..metrics import RouterMetrics
from .event_ids import Position
from .persisted_requests import PersistedRequests
from .resumable_writer import EventStreamWriter
from .service import PersistedJobs


class OutputStreamer:
    """Gives kept answers, by the ways of any answer: slow clients are cut off, those that leave are let go."""

    def __init__(
        self,
        requests: OpenRequests,
        persisted: PersistedRequests,
        relay: Relay,
        jobs: PersistedJobs,
        lifecycle: Lifecycle,
        metrics: RouterMetrics,
    ) -> None:
        self._requests = requests
        self._persisted = persisted
        self._relay = relay
        self._jobs = jobs
        self._lifecycle = lifecycle
        self._metrics = metrics

    async def give(
        self, kept: PersistedJob, receive: Receive, exchange: ResponseWriter, stitch: AttemptMerger | None = None
    ) -> None:
        """Answer with what ``kept`` has said and will say; ``stitch``: in which form, if not as it is kept."""
        connection, requests = Connection(receive), self._requests
        request = OpenRequest(connection, asyncio.get_running_loop().time())
        request.commented = isinstance(exchange, EventStreamWriter)
        requests.add(request)
        try:
            self._lifecycle.ensure_accepting()
            requests.admit(request, kept.tenant)
            self._persisted.follow(request, kept, stitch=stitch)
            connection.watch(request.on_gone)
            await self._relay.run(request, exchange)
        except InferqError as error:
            connection.unwatch()
            await exchange.fail(error, mid_event=request.stitch is not None and request.stitch.mid_event)
        except ClientGone:
            self._metrics.disconnects.labels(request.why_gone).inc()
        finally:
            connection.unwatch()
            self._jobs.leave(request)
        await connection.closed()


class PersistedResponse(Response):
    """The answer of a job, as the request itself would have got it; with ``events``, as an event stream of which the
    client has what is up to ``after``; in the form that ``stitch`` gives it, if there is one."""

    def __init__(
        self,
        giver: OutputStreamer,
        kept: PersistedJob,
        *,
        events: bool = False,
        after: Position | None = None,
        stitch: AttemptMerger | None = None,
    ) -> None:
        super().__init__()
        self._giver = giver
        self._kept = kept
        self._events = events
        self._after = after
        self._stitch = stitch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":  # the service writes the request's id itself
                headers = [header for header in message["headers"] if header[0] != REQUEST_ID_HEADER]
                message = {**message, "headers": headers}
            await send(message)

        request_id = str(scope["state"]["request_id"]).encode()
        path = self._kept.metadata.path
        if self._stitch is not None:
            path = RESPONSES_PATH  # what is kept is a chat, and its client reads a response
        exchange = (
            EventStreamWriter(send_on, request_id, self._after, path)
            if self._events
            else ResponseWriter(send_on, request_id, path)
        )
        if self._after is not None and self._after.job_id is not None and isinstance(exchange, EventStreamWriter):
            exchange.name(self._after.job_id)
        await self._giver.give(self._kept, receive, exchange, self._stitch)
