"""The simulated engine inside the worker's own process, behind the engine port."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager

import orjson

from queue_schemas import EngineFailed, EngineState
from queue_schemas.fleet.model_cards import Card, bounded_cards
from scheduling.slots import EngineLoad
from telemetry.backoff import Backoff

from ...core import read_load
from ..adapter_calls import load_adapter, unload_adapter
from ..dialects import VLLM
from ..port import EngineAnswer, EngineCall, EngineGone
from ..step_reader import StepReader
from .adapter_load import AdapterLoad
from .api import wire
from .api.wire import Reply
from .run import ConnectionClosed, EngineCrashed, Run
from .settings import SimulationSettings
from .simulation import Simulation

_RESTART_BACKOFF = Backoff(0.1, 5.0, jitter=0)
"""How long a crashed engine is gone: the first after the first crash, twice as long after each that follows soon."""
STABLE_S = 10.0
"""An engine that lived as long has proved well."""


class SimulatedEngine:
    """Implements :class:`worker.engines.Engine` without HTTP. A crash fails every call that runs; then it restarts."""

    dialect = VLLM

    def __init__(self, settings: SimulationSettings | None = None) -> None:
        self.settings = settings or SimulationSettings()
        self.simulation = Simulation(self.settings)
        self.state = EngineState.STARTING
        self.detail = "the simulated engine is loading its model"
        self.models: tuple[str, ...] = ()
        self.cards: Mapping[str, Card] = {}
        self.restarts = 0
        self.failures = 0
        self._crashed = asyncio.Event()

    async def run(self, changed: Callable[[], None]) -> None:
        """Start the engine, and again whenever it crashed, until cancelled."""
        while True:
            await self._start()
            changed()
            ready_at = time.monotonic()
            await self._crashed.wait()
            changed()
            stable = time.monotonic() - ready_at > STABLE_S
            self.failures = 1 if stable else self.failures + 1
            await asyncio.sleep(_RESTART_BACKOFF.pause_s(self.failures))
            self._crashed.clear()
            self.simulation = Simulation(self.settings)
            self.restarts += 1

    @asynccontextmanager
    async def call(self, call: EngineCall) -> AsyncIterator[EngineAnswer]:
        """One request; see the port."""
        if self.state is not EngineState.READY:
            raise EngineFailed(f"{self.detail}: try again")
        answer = self.simulation.open("POST", call.path, call.body)
        if isinstance(answer, Reply):
            yield _WholeAnswer(answer)
        elif isinstance(answer, Run) and answer.streams:
            async with aclosing(self._guarded(answer.events())) as pieces:
                yield _StreamedAnswer(answer.content_type, pieces)
        else:
            yield _WholeAnswer(await self._whole(answer))

    async def progress(self) -> int | None:
        """What the engine got done so far."""
        return self.simulation.output if self.state is EngineState.READY else None

    async def load(self) -> EngineLoad | None:
        """What its metrics say."""
        return read_load(self.simulation.metrics()) if self.state is EngineState.READY else None

    async def load_adapter(self, name: str, path: str) -> None:
        """Load an adapter; see the port."""
        self.models = await load_adapter(self, name, path)

    async def unload_adapter(self, name: str) -> None:
        """Unload it."""
        self.models = await unload_adapter(self, name)

    async def exchange(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body of the answer to a call that is no inference."""
        if self.state is not EngineState.READY:
            raise EngineFailed(f"{self.detail}: try again")
        answer = self.simulation.open(method, path, body)
        reply = answer if isinstance(answer, Reply) else await self._whole(answer)
        return reply.status, reply.body

    async def list_models(self) -> tuple[str, ...]:
        """The models that it serves now, adapters included; their cards are noted."""
        settings = self.simulation.settings
        listed = orjson.loads(wire.model_list(settings, 0))["data"]
        self.cards = bounded_cards({model["id"]: model for model in listed})
        return (*settings.models, *settings.adapters)

    async def stop(self, limit_s: float) -> None:
        """End it: every call that still runs fails."""
        self._fail("the simulated engine was stopped")

    async def _start(self) -> None:
        self.state, self.detail = EngineState.STARTING, "the simulated engine is loading its model"
        await self.simulation.until_ready()
        self.state, self.detail = EngineState.READY, ""
        self.models = await self.list_models()

    async def _whole(self, answer: Run | AdapterLoad) -> Reply:
        try:
            return await answer.reply()
        except (EngineCrashed, ConnectionClosed) as error:
            raise self._failed(error) from error

    async def _guarded(self, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        async with aclosing(events):
            try:
                async for piece in events:
                    yield piece
            except (EngineCrashed, ConnectionClosed) as error:
                raise self._failed(error) from error

    def _failed(self, error: EngineCrashed | ConnectionClosed) -> EngineGone:
        if isinstance(error, ConnectionClosed):
            return EngineGone("the engine closed the connection before the answer was complete")
        if self.state is EngineState.READY:
            self._fail("the simulated engine crashed and starts again")
            self._crashed.set()
        return EngineGone("the engine crashed")

    def _fail(self, detail: str) -> None:
        self.state, self.detail = EngineState.FAILED, detail
        self.simulation.crash()


class _WholeAnswer:
    """An answer that was complete when its head came."""

    delimited = True
    retry_after_s = None
    headers: Mapping[str, str] = {}

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self.status = reply.status
        self.content_type = reply.content_type

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        if self._reply.body:
            yield self._reply.body

    async def read_in_steps(self, reader: StepReader, take: Callable[[bytes], None]) -> bool:
        return False

    async def read(self, limit_bytes: int) -> bytes:
        return self._reply.body


class _StreamedAnswer:
    """A stream in the making."""

    status = 200
    delimited = True
    retry_after_s = None
    headers: Mapping[str, str] = {}

    def __init__(self, content_type: str, pieces: AsyncGenerator[bytes, None]) -> None:
        self.content_type = content_type
        self._pieces = pieces

    def chunks(self) -> AsyncGenerator[bytes, None]:
        return self._pieces

    async def read_in_steps(self, reader: StepReader, take: Callable[[bytes], None]) -> bool:
        return False

    async def read(self, limit_bytes: int) -> bytes:
        parts, size = [], 0
        async for piece in self._pieces:
            parts.append(piece)
            size += len(piece)
            if size > limit_bytes:
                break
        return b"".join(parts)
