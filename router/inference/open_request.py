"""One open request: its state while it waits for an answer, and what is told when something changes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from queue_schemas import (
    BrokerUnavailable,
    DeadlineExceeded,
    Frame,
    InferqError,
    Job,
    Marker,
    PersistOptions,
    RequestTimeout,
    Tenant,
)
from scheduling.prediction import Place
from telemetry import get_logger

from ..http.bodies import ClientGone
from ..http.connection import Connection
from .merging.attempt_merger import AttemptMerger

MAX_RESUBMISSIONS = 3
"""How often a request is queued again because its job or frames of its answer were lost."""

log = get_logger(__name__)
_NOT_PERSISTED = PersistOptions(0)
_NEVER = float("inf")
_T = TypeVar("_T")


def request_timeout() -> InferqError:
    """The error of a request whose body did not arrive in time."""
    return RequestTimeout("the request took too long; send it again")


def _queue_silent() -> InferqError:
    return DeadlineExceeded("the request's time ran out while Redis did not answer; try again")


class OpenRequest:
    """One request. Times are the event loop's, in seconds; infinity where there is no limit."""

    __slots__ = (
        "_future",
        "_interrupted",
        "_on_interrupt_limit",
        "_task",
        "always_event_stream",
        "begun",
        "body_bytes",
        "catching_up",
        "checked_s",
        "client_grace_s",
        "connection",
        "deadline_s",
        "disconnect_reason",
        "disconnected",
        "error",
        "fallback",
        "frames_lost",
        "has_news",
        "interrupt_at_s",
        "is_follower",
        "job",
        "keepalive_due",
        "last_sent_s",
        "live_buffer",
        "merger",
        "on_news",
        "patience_ms",
        "persist_options",
        "place",
        "received",
        "resubmissions",
        "resubmit_at_s",
        "sending_since_s",
        "started_s",
        "tenant",
    )

    def __init__(self, connection: Connection, now_s: float) -> None:
        self.connection = connection
        self.started_s = self.last_sent_s = now_s
        self.tenant: Tenant | None = None
        """None until it is admitted."""
        self.job: Job | None = None
        self.merger: AttemptMerger | None = None
        self.error: InferqError | None = None
        self.deadline_s = self.interrupt_at_s = self.sending_since_s = self.resubmit_at_s = _NEVER
        self.client_grace_s = _NEVER
        """How long after the deadline the client still waits to hear of it."""
        self.fallback: Callable[[], Awaitable[bool]] | None = None
        """Sends the request again in another form if the engine lacks its path; False: there is no other form."""
        self.on_news: Callable[[], None] | None = None
        """Called when something changed, while it has no coroutine."""
        self.begun = False
        """Whether the client got something of the answer."""
        self.has_news = self.disconnected = self.keepalive_due = self.frames_lost = False
        self.disconnect_reason = "left"
        self.resubmissions = 0
        self.body_bytes = 0
        self.patience_ms: int | None = None
        """How long its job may have to wait, by prediction, to be taken in; None: for any time, or it was."""
        self.place: tuple[Place, float] | None = None
        """Where its job stood in its queue, and when that was."""
        self.persist_options = _NOT_PERSISTED
        """How the output of its job is kept, if it is."""
        # Of a persisted job:
        self.catching_up = False
        """Its kept output is to be read before anything live counts."""
        self.live_buffer: list[Frame | Marker] | None = None
        """What came live while a page of kept output is on its way; None: too much, or nothing is on its way."""
        self.received = False
        """Something came since the job was last checked."""
        self.checked_s = now_s
        self.is_follower = False
        """It did not put the job on the queue and could not put it there again."""
        self.always_event_stream = False
        """It is answered with an event stream whatever its job's answer is."""
        self._task: asyncio.Task[Any] | None = None
        self._interrupted = False
        self._on_interrupt_limit: Callable[[], InferqError] = request_timeout
        self._future: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Return once something changed since the last call."""
        if not self.has_news:
            self._future = asyncio.get_running_loop().create_future()
            await self._future
        self.has_news = False

    def notify(self) -> None:
        """Wake its coroutine, or whatever serves it instead."""
        self.has_news = True
        future = self._future
        if self.on_news is not None:
            self.on_news()
        elif future is not None:
            self._future = None
            if not future.done():
                future.set_result(None)

    def feed(self, merger: AttemptMerger, item: Frame | Marker) -> None:
        """Pass a frame or marker of its job to ``merger``."""
        try:
            if type(item) is Frame:
                merger.on_frame(item)
            elif type(item) is Marker:
                merger.on_marker(item)
        except Exception:  # one answer's fault must not end the reader of all
            log.exception("merge_failed", job_id=item.job_id)
            self.fail(InferqError("the answer could not be put together; the router's log says why"))

    def fail(self, error: InferqError) -> None:
        """Answer with ``error``, unless there is an answer or another error already."""
        if self.error is None:
            self.error = error
        self._interrupt()
        self.notify()

    def client_disconnected(self, why: str = "left") -> None:
        """The client went away, or was cut off; the first reason counts."""
        if not self.disconnected:
            self.disconnect_reason = why
        self.disconnected = True
        self._interrupt()
        self.notify()

    def disconnect_client(self, why: str) -> None:
        """Disconnect the client, which is too slow or stalled."""
        log.warning("client_disconnected", why=why, job_id=self.job.id if self.job is not None else "")
        self.sending_since_s = _NEVER
        self.client_disconnected(why)
        self.connection.disconnect()

    def start_deadline(self, ttl_ms: int, now_s: float) -> None:
        """Start its deadline, unless it has one already."""
        if self.deadline_s == _NEVER:
            self.deadline_s = now_s + ttl_ms / 1000

    def start_catching_up(self) -> None:
        """Have it read the kept output of its persisted job before anything live counts."""
        self.catching_up = True
        self.live_buffer = None
        self.notify()

    def allow_interrupt(self, limit_s: float, on_limit: Callable[[], InferqError]) -> None:
        """From now on the current task may be cancelled: at ``limit_s`` with the error that ``on_limit`` makes, or when
        the client goes."""
        self._task = asyncio.current_task()
        self.interrupt_at_s, self._on_interrupt_limit = limit_s, on_limit

    def forbid_interrupt(self) -> None:
        """End what :meth:`allow_interrupt` or :meth:`begin_call` began."""
        self._task = None
        self.interrupt_at_s = _NEVER

    def begin_call(self) -> None:
        """A call to the queue is under way that no task waits for: :meth:`fail` comes at the deadline."""
        self.interrupt_at_s, self._on_interrupt_limit = self.deadline_s, _queue_silent

    async def within_deadline(self, call: Awaitable[_T]) -> _T:
        """The answer of a call to the queue, unless the client goes or the request's time runs out before it comes.

        Raises ``ClientGone``, the request's error, what the call raises, and ``BrokerUnavailable`` if the connection to
        the queue is closed meanwhile.
        """
        self.allow_interrupt(self.deadline_s, _queue_silent)
        try:
            return await call
        except asyncio.CancelledError:
            if self.absorb_interrupt():
                raise self.error or ClientGone from None
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise BrokerUnavailable("the connection to the queue was closed; try again", retry_after_s=1) from None
        finally:
            self.forbid_interrupt()

    def absorb_interrupt(self) -> bool:
        """After a ``CancelledError``: whether it was our own interrupt, which is then dealt with."""
        task = asyncio.current_task()
        if not self._interrupted or task is None:
            return False
        self._interrupted = False
        return task.uncancel() == 0

    def time_out(self) -> None:
        """Its interruptible call took too long."""
        self.fail(self._on_interrupt_limit())

    def _interrupt(self) -> None:
        if self._task is not None and not self._interrupted:
            self._interrupted = True
            self._task.cancel()
