"""Answers one ordinary request from callbacks: a job that is queued and answered costs no task, and no wake of one.

The queue's answers and the client's connection call back, and :meth:`Relay.advance` writes what has come. When
something must be waited for (a client that reads slowly, an attempt that was lost, an error to be told), a task goes on
for the rest, as if the request had been served as ASGI from its beginning.
"""

from __future__ import annotations

import asyncio

from starlette.types import Receive, Scope, Send

from queue_schemas import Enqueued
from telemetry.http.connections import RequestCycle

from .exchange import Exchange
from .relay import Relay, Step
from .service import InferenceService, PreparedRequest


class DirectAnswer:
    """The answer to the request of ``exchange``, which came on ``cycle``."""

    __slots__ = ("_cycle", "_enqueued", "_exchange", "_is_over", "_relay")

    def __init__(self, cycle: RequestCycle, exchange: Exchange, relay: Relay) -> None:
        self._cycle = cycle
        self._exchange = exchange
        self._relay = relay
        self._is_over = False
        """The answer is complete, or a task goes on."""
        self._enqueued: asyncio.Future[Enqueued] | None = None
        """The queue's answer, until it has said that it has the job."""

    def begin(self, service: InferenceService, prepared: PreparedRequest) -> None:
        """Put the job on the queue; from now on everything comes by callback."""
        request = self._exchange.request
        request.on_news = self._advance
        try:
            self._enqueued = service.begin(request, prepared)
            self._enqueued.add_done_callback(self._on_enqueued)
        except Exception as error:  # noqa: BLE001 - the task answers it
            self._go_on(error)

    def _on_enqueued(self, enqueued: asyncio.Future[Enqueued]) -> None:
        failed = enqueued.cancelled() or enqueued.exception() is not None
        if self._is_over:
            return
        if failed:
            self._go_on(None)
        else:
            self._enqueued = None
            self._relay.begun(self._exchange.request, enqueued.result())

    def _advance(self) -> None:
        exchange = self._exchange
        request = exchange.request
        request.has_news = False
        if self._enqueued is not None:
            request.keepalive_due = False  # it would begin an answer that the queue may refuse with another status
        if not self._cycle.has_room:
            self._go_on(None)
            return
        try:
            step = self._relay.advance(request, exchange.writer)
        except Exception as error:  # noqa: BLE001 - the task answers it
            self._go_on(error)
            return
        if step is Step.UNUSUAL:
            self._go_on(None)
        elif step is Step.ENDED:
            self._leave()
            exchange.end()

    def _go_on(self, error: Exception | None) -> None:
        """Have a task answer ``error``, or whatever is the matter with the request or its place on the queue."""
        self._leave()
        self._exchange.request.has_news = True

        async def rest(_scope: Scope, _receive: Receive, _send: Send) -> None:
            await self._exchange.run(self._rest(error))

        self._cycle.serve_by(rest)

    def _leave(self) -> None:
        self._is_over = True
        self._exchange.request.on_news = None
        self._exchange.request.forbid_interrupt()

    async def _rest(self, error: Exception | None) -> None:
        if error is not None:
            raise error
        request = self._exchange.request
        if self._enqueued is not None and not request.disconnected and request.error is None:
            await self._relay.confirm(request, self._enqueued)
        await self._relay.run(request, self._exchange.writer)
