"""Follow the model of the assignment: let what runs end, then restart the engine with the other model."""

from __future__ import annotations

import asyncio
from typing import NoReturn

from telemetry import get_logger

from ..context import WorkerContext
from ..engines.process import ProcessEngine
from .attempt_set import Attempts
from .waiting import first

log = get_logger(__name__)


class ModelSwap:
    """Has the switching engine of ``context``, if there is one, load what :meth:`want` says.

    Nothing is claimed meanwhile: an assignment with another model names no pools. What runs for longer than
    ``drain_timeout_ms`` is handed back as if it had not been started.
    """

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._wanted = ""
        self._changed = asyncio.Event()

    def want(self, model: str) -> None:
        """The engine is to serve ``model``; empty, or one that it cannot load: what it serves."""
        if model != self._wanted:
            self._wanted = model
            self._changed.set()

    async def run(self, attempts: Attempts) -> NoReturn:
        """Swap whenever another model is wanted, until cancelled. What is wanted last counts."""
        engine = self._context.switching
        while True:
            await self._changed.wait()
            self._changed.clear()
            if engine is not None and self._wanted in engine.loadable and self._wanted != engine.loaded:
                await first(self._swap(engine, self._wanted, attempts), self._changed.wait())

    async def _swap(self, engine: ProcessEngine, model: str, attempts: Attempts) -> None:
        log.info("model_swap_begun", model=model, before=engine.loaded, running=len(attempts))
        await attempts.finish(self._context.settings.drain_timeout_ms / 1000, self._context.hurry)
        if self._wanted == model and not self._context.drain.is_set():
            self._context.metrics.models_loaded.inc()
            engine.switch(model)
