"""Follow the adapters of the assignment: load those that are missing; unload others once none of their jobs runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import NoReturn

from queue_schemas import EngineFailed, EngineState
from queue_schemas.fleet.adapters import MAX_FAILURE_LENGTH
from telemetry import get_logger

from ..context import WorkerContext
from ..engines.adapter_calls import AdaptersUnsupported
from ..engines.adapter_folder import AdapterFolder
from .attempt_set import Attempts

_RETRY_S = 1.0
"""When an engine that could not unload an adapter is asked again."""

log = get_logger(__name__)


class AdapterLoads:
    """Has the engine of ``context`` hold the adapters of ``folder`` that :meth:`want` names, one change at a time.

    ``changed`` is called when other adapters can be served than before, or one has failed. An assignment names no pool
    of an adapter that it does not want, so nothing of it is claimed; what runs for longer than ``drain_timeout_ms`` is
    handed back as if it had not been started. An engine that was started anew is given its adapters again.
    """

    def __init__(self, context: WorkerContext, folder: AdapterFolder, changed: Callable[[], None]) -> None:
        self.failures: dict[str, str] = {}
        """Why adapters that are wanted could not be loaded, for people."""
        self._context = context
        self._folder = folder
        self._on_change = changed
        self._wanted: frozenset[str] | None = None
        self._unsupported = False
        self._unloading: set[str] = set()
        """Adapters whose unloading was sent: the engine may have them no more, whatever it listed last."""
        self._ours: set[str] = set()
        """Adapters that this worker had loaded, also if their folders are gone."""
        self._draining: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    @property
    def room(self) -> int:
        """How many adapters it may hold now."""
        return 0 if self._unsupported else self._folder.room

    def want(self, names: Collection[str] | None) -> None:
        """The engine is to hold these adapters and no others; None: whatever it does. One that failed and is wanted
        still, or again, is tried again."""
        self._wanted = None if names is None else frozenset(names)
        self.failures.clear()
        self._changed.set()

    def engine_changed(self) -> None:
        """It may have been started anew, without adapters."""
        if self._context.engine.state is not EngineState.READY:
            self._unsupported = False  # the next one may be another
            self._unloading.clear()
        self._changed.set()

    def lacks(self, model: str) -> bool:
        """Whether ``model`` is an adapter that the engine does not have (any more): its jobs go back."""
        if model in self._unloading:
            return True
        return (model in self._folder.names or model in self._ours) and model not in self._context.engine.models

    async def run(self, attempts: Attempts) -> NoReturn:
        """Follow what is wanted until cancelled. What is wanted last counts."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._changed.wait()
                self._changed.clear()
                if self._wanted is not None and self._context.engine.state is EngineState.READY:
                    self._drain_unwanted(self._wanted, attempts, group)
                    await self._load_missing(self._wanted)

    def _drain_unwanted(self, wanted: frozenset[str], attempts: Attempts, group: asyncio.TaskGroup) -> None:
        for name in (wanted & self._draining.keys()) - self._unloading:
            self._draining.pop(name).cancel()
        held = self._held()
        for name in sorted(held - wanted - self._draining.keys()):
            self._draining[name] = group.create_task(self._unload(name, attempts), name=f"unload {name}")

    async def _load_missing(self, wanted: frozenset[str]) -> None:
        """Load one adapter for which there is room; and then the next, unless something else changed."""
        held = self._held()
        missing = sorted((wanted & self._folder.names) - held - self.failures.keys())
        for name in sorted(wanted - self._folder.names - held - self.failures.keys()):
            self._note_failure(name, "it is not in this worker's folder of adapters")
        if missing and len(held) < self.room:
            await self._load(missing[0])
            self._changed.set()

    async def _load(self, name: str) -> None:
        metrics = self._context.metrics
        try:
            await self._context.engine.load_adapter(name, self._folder.path_of(name))
        except EngineFailed as error:
            self._unsupported = isinstance(error, AdaptersUnsupported)
            metrics.adapter_changes.labels("failed").inc()
            self._note_failure(name, error.message)
        else:
            log.info("adapter_loaded", adapter=name)
            metrics.adapter_changes.labels("loaded").inc()
            self._ours.add(name)
            self._unloading.discard(name)
            self._on_change()

    async def _unload(self, name: str, attempts: Attempts) -> None:
        """Unload it once none of its jobs runs. If the engine cannot, it is asked again later."""
        context = self._context
        try:
            await attempts.finish_model(name, context.settings.drain_timeout_ms / 1000, context.hurry)
            self._unloading.add(name)
            await attempts.finish_model(name, 0, context.hurry)  # what began just before that
            await context.engine.unload_adapter(name)
        except EngineFailed as error:
            log.warning("adapter_not_unloaded", adapter=name, error=error.message, again_in_s=_RETRY_S)
            self._unloading.discard(name)
            await asyncio.sleep(_RETRY_S)
        else:
            log.info("adapter_unloaded", adapter=name)
            context.metrics.adapter_changes.labels("unloaded").inc()
            self._ours.discard(name)
            self._on_change()
        if self._draining.get(name) is asyncio.current_task():
            del self._draining[name]
        self._changed.set()

    def _held(self) -> set[str]:
        """What the engine has of the adapters that may come and go."""
        return set(self._context.engine.models) & (self._folder.names | self._ours)

    def _note_failure(self, name: str, why: str) -> None:
        log.warning("adapter_load_failed", adapter=name, error=why, then="its jobs go to other workers if there are")
        self.failures[name] = why[:MAX_FAILURE_LENGTH]
        self._on_change()
