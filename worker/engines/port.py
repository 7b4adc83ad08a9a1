"""The port through which a worker reaches an engine: a server that answers the OpenAI API for it.

Adapters: :mod:`worker.engines.http` (a server that somebody else runs), :mod:`worker.engines.vllm` (a subprocess of the
worker) and :mod:`worker.engines.simulated`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import field
from typing import Protocol

from queue_schemas import EngineFailed, EngineState
from queue_schemas.fleet.model_cards import Card
from queue_schemas.records import record
from scheduling.slots import EngineLoad

from .dialects import Dialect
from .step_reader import StepReader


class EngineGone(EngineFailed):
    """The engine broke off while it had the request: it crashed, or closed this one connection."""


@record
class EngineCall:
    """One inference request. ``path`` is absolute (``/v1/chat/completions``); ``body`` are the client's own bytes.

    ``call_id`` names the call towards the engine: a UUID, another one for each attempt.
    """

    path: str
    body: bytes
    content_type: str = "application/json"
    call_id: str = ""
    traceparent: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Further headers of the client's (:mod:`queue_schemas.headers`)."""


class EngineAnswer(Protocol):
    """What the engine answers. Use either :meth:`read` or :meth:`chunks`, once."""

    @property
    def status(self) -> int:
        """The HTTP status."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers that the client is to see (:mod:`queue_schemas.headers`)."""
        ...

    @property
    def content_type(self) -> str:
        """The ``Content-Type`` with its parameters. An answer that starts with ``text/event-stream`` is a stream."""
        ...

    @property
    def retry_after_s(self) -> float | None:
        """When the engine says (``Retry-After``) that it may be asked again, in seconds from now; None: it does not."""
        ...

    @property
    def delimited(self) -> bool:
        """Of an answer that was read to its end: whether its length or chunks said where that is. False: the connection
        was closed there, as it is when an engine dies."""
        ...

    def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it arrives, in pieces of any size, none empty; what arrived while nobody asked is one piece.

        Raises ``EngineGone`` if the connection breaks before the answer is complete.
        """
        ...

    async def read_in_steps(self, reader: StepReader, take: Callable[[bytes], None]) -> bool:
        """In the midst of :meth:`chunks`: pass ``take`` what has arrived, have ``reader`` read and pass on the rest of
        the body, and return at the end. False: this answer cannot be read so, or nothing is left to be read.

        Raises as :meth:`chunks` does, and what ``take`` raises.
        """
        ...

    async def read(self, limit_bytes: int) -> bytes:
        """The whole body, or, of one that is larger than ``limit_bytes``, more than ``limit_bytes`` bytes of it.

        Raises ``EngineGone`` if the connection breaks before the answer is complete.
        """
        ...


class Engine(Protocol):
    """One engine, supervised."""

    @property
    def state(self) -> EngineState:
        """Only a READY engine is given calls."""
        ...

    @property
    def detail(self) -> str:
        """A sentence for people: what it is waiting for, or why it failed."""
        ...

    @property
    def failures(self) -> int:
        """How often in a row it failed, without being well for a while between. 0: nothing to worry about."""
        ...

    @property
    def models(self) -> tuple[str, ...]:
        """The model ids it lists, adapters included. Empty until it was READY once."""
        ...

    @property
    def cards(self) -> Mapping[str, Card]:
        """What it says of each model beside its id (:mod:`queue_schemas.fleet.model_cards`)."""
        ...

    @property
    def dialect(self) -> Dialect:
        """Its ways where engines differ. Those of a server that is not known, until it was READY once."""
        ...

    async def run(self, changed: Callable[[], None]) -> None:
        """Supervise the engine until cancelled: start it, watch it, restart it with back-off, refresh its models.

        Calls ``changed`` whenever state, detail or models changed. Never raises for anything an engine does.
        """
        ...

    def call(self, call: EngineCall) -> AbstractAsyncContextManager[EngineAnswer]:
        """Send a request; entering gives the answer once its head arrived.

        Leaving the context before the answer was read to its end closes the connection, upon which the engine aborts
        the request. Entering raises ``EngineFailed`` if the engine cannot be reached, ``EngineGone`` if it broke off,
        ``BadRequest`` for a request that could not be sent to any engine.
        """
        ...

    async def progress(self) -> int | None:
        """A number that changes whenever the engine produced output; None if it did not answer within 2 s."""
        ...

    async def load(self) -> EngineLoad | None:
        """What it says of its load now; None if it says nothing that can be believed within 2 s."""
        ...

    async def load_adapter(self, name: str, path: str) -> None:
        """Load the LoRA adapter in the engine's folder ``path``; it is among ``models`` then, as ``name``.

        Raises ``AdapterRefused`` and ``AdaptersUnsupported`` (:mod:`worker.engines.adapter_calls`) with the reason, and
        ``EngineFailed`` for an engine that is not reached.
        """
        ...

    async def unload_adapter(self, name: str) -> None:
        """Unload it: it is not among ``models`` then. Raises as :meth:`load_adapter` does."""
        ...

    async def stop(self, limit_s: float) -> None:
        """End the engine (if it is ours to end) and free what it holds, within ``limit_s`` seconds."""
        ...
