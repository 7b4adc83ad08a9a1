"""What inference needs of jobs and responses, which build on it: :mod:`router.composition` passes these in."""

from __future__ import annotations

from typing import Protocol

from starlette.types import Send

from queue_schemas import Job, Pool

from ..http.response_writer import ResponseWriter
from .merging.attempt_merger import AttemptMerger
from .open_request import OpenRequest
from .request_fields import RequestFields


class PersistedMode(Protocol):
    """Requests whose output is kept while a client waits for it: those with an idempotency key, and resumable streams.

    :class:`router.jobs.persisted_requests.PersistedRequests`.
    """

    def resumable_writer(
        self, send: Send, request_id: bytes, path: str, last_event_id: bytes, *, keyed: bool
    ) -> ResponseWriter:
        """The writer of a stream whose events carry ids, behind the event that ``last_event_id`` names."""
        ...

    async def start(self, request: OpenRequest, job: Job, writer: ResponseWriter) -> None:
        """Queue ``job`` for ``request``, or follow the job that its key or its last event names."""
        ...

    def leave(self, request: OpenRequest, job: Job) -> None:
        """``request`` is over before its job."""
        ...


class BackgroundMode(Protocol):
    """Background jobs: :class:`router.jobs.service.JobService`."""

    async def accept(self, job: Job, fields: RequestFields, request: OpenRequest, writer: ResponseWriter) -> None:
        """Queue ``job`` and answer with its object."""
        ...


class ChatConversion(Protocol):
    """A request for a response that a chat completion answers: :class:`router.responses.service.ResponseFromChat`."""

    @property
    def path(self) -> str:
        """Of the chat, as ``content_type``, ``body`` and ``fields``."""
        ...

    @property
    def content_type(self) -> str: ...

    @property
    def body(self) -> bytes: ...

    @property
    def fields(self) -> RequestFields: ...

    @property
    def stream(self) -> bool:
        """Whether the client asked for events."""
        ...

    @property
    def background(self) -> bool: ...

    @property
    def digest(self) -> str:
        """Tells whether two requests for responses are the same: the chat does not say all that was asked."""
        ...

    def merger(self, job: Job) -> AttemptMerger:
        """What turns the chat of ``job`` into the response that its client waits for."""
        ...

    async def accept(self, job: Job, request: OpenRequest, writer: ResponseWriter) -> bool:
        """Queue the background ``job``. True: ``request`` follows its events now; False: it was answered."""
        ...


class ResponsesMode(Protocol):
    """Responses built from chats: :class:`router.responses.service.ResponseService`."""

    def convert(self, body: bytes, fields: RequestFields, *, keyed: bool, tier: str) -> ChatConversion | None:
        """The chat that answers a request for a response; None: the engine is asked for the response itself. ``tier``:
        what the response is to say of its service tier, '' for what it asks for."""
        ...

    def convert_refused(self, model: Pool, body: bytes, tier: str) -> ChatConversion | None:
        """The same after an engine of ``model`` answered that it has no Responses API; None: no chat can say it."""
        ...
