"""Membership: registered with a Manager, kept so by heartbeats, over all Manager URLs and restarts of Managers.

What a worker runs does not depend on it: while no Manager answers, jobs are pulled on the last assignment.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn, Protocol

from queue_schemas import (
    Assignment,
    AuthenticationFailed,
    BadRequest,
    Heartbeat,
    InferqError,
    Registration,
    RegistrationAnswer,
    SessionId,
    UnknownWorker,
    WorkerIdTaken,
    WorkerStatus,
)
from telemetry import get_logger
from telemetry.backoff import Backoff

from .manager_client import FabricClient
from .metrics import WorkerMetrics

_BACKOFF = Backoff(0.2, 2.0)
_TAKEN_TRIES = 6
_TAKEN_PAUSE_S = 0.5
"""A worker that was restarted at once waits so long for its predecessor to be found dead: 3 s in all."""
_MIN_GAP_S = 0.1
_STEADY_PRESENCE_S = 10.0
_PRESENCE_BACKOFF = Backoff(0.3, 15.0)
_NOBODY_HOLDS_BACKOFF = Backoff(450.0, 450.0)
"""How long a worker waits until it asks again a Manager of a version that holds no connections."""
_REASONS_REMEMBERED = 32

log = get_logger(__name__)


class Assigned(Protocol):
    """Takes an assignment. ``registered``: it answers a registration, so it holds whatever the one before was."""

    def __call__(self, assignment: Assignment, *, registered: bool) -> None: ...


class Membership:
    """Registers one session id and keeps it registered.

    ``status()`` is what heartbeats say; ``assigned`` and ``drain`` are called with what the answers bring.
    """

    def __init__(
        self,
        client: FabricClient,
        worker_id: str,
        *,
        url: str | None,
        region: str,
        metrics: WorkerMetrics,
        status: Callable[[], WorkerStatus],
        assigned: Assigned,
        drain: Callable[[], None],
    ) -> None:
        self._client = client
        self._worker_id = worker_id
        self._url = url
        self._region = region
        self._metrics = metrics
        self._status = status
        self._assigned = assigned
        self._drain = drain
        self._changed = asyncio.Event()
        self._heartbeat_s = 2.0
        self._said: deque[str] = deque(maxlen=_REASONS_REMEMBERED)
        self.registered = False
        self.trouble = "not registered with a Manager yet"
        """Why it is not registered, for people; empty when it is."""

    def notify(self) -> None:
        """Something the Manager should know has changed: send a heartbeat soon."""
        self._changed.set()

    async def register(self, *, first: bool) -> RegistrationAnswer:
        """Register, trying until a Manager accepts.

        Raises ``WorkerIdTaken`` when another worker holds the id for 3 s and, the ``first`` time, what cannot be
        mended by waiting: ``AuthenticationFailed``, ``BadRequest``. No URL of several speaks for the others, so that
        is raised once each has refused: one that does not answer yet may still let this worker in.
        """
        failures = taken = 0
        tried: dict[str, InferqError] = {}
        while True:
            try:
                answer = await self._client.register(self._registration())
            except WorkerIdTaken as error:
                taken += 1
                if taken > _TAKEN_TRIES:
                    raise WorkerIdTaken(
                        f"another worker called {self._worker_id} is alive: {error.message}; "
                        "stop it, or start this one with another --worker-id"
                    ) from error
                await asyncio.sleep(_TAKEN_PAUSE_S)
                continue
            except InferqError as error:
                tried[self._client.url] = error
                if first and tried.keys() >= self._client.urls and all(map(_is_refusal, tried.values())):
                    raise
                self._lost(error.message)
                self._client.turn()
                failures += 1
                await asyncio.sleep(_BACKOFF.pause_s(failures))
                continue
            self._heartbeat_s = answer.heartbeat_interval_ms / 1000
            self.registered, self.trouble = True, ""
            self._said.clear()
            log.info("registered", manager=self._client.url, pools=len(answer.assignment.pools))
            self._assigned(answer.assignment, registered=True)
            return answer

    async def run(self) -> NoReturn:
        """Send heartbeats until cancelled; registers again when the Manager does not know us or does not answer."""
        while True:
            await self._pause()
            try:
                answer = await self._client.heartbeat(self._worker_id, Heartbeat(**self._status().model_dump()))
            except UnknownWorker as error:
                self._lost(error.message)
                await self.register(first=False)
            except InferqError as error:
                self._metrics.heartbeats_failed.inc()
                self._lost(error.message)
                self._client.turn()
                await self.register(first=False)
            else:
                self._assigned(answer.assignment, registered=False)
                if answer.drain:
                    self._drain()

    async def hold_session_connection(self, session_id: SessionId) -> NoReturn:
        """Hold a connection to whoever this worker is registered with, until cancelled."""
        failures = 0
        while True:
            begun = asyncio.get_running_loop().time()
            failures += 1
            backoff = _PRESENCE_BACKOFF
            try:
                await self._client.hold_session_connection(self._worker_id, session_id)
            except UnknownWorker:
                backoff = _NOBODY_HOLDS_BACKOFF
            except InferqError as error:
                log.debug("presence_not_held", error=error.message)
            if asyncio.get_running_loop().time() - begun > _STEADY_PRESENCE_S:
                failures = 1
            # A Router that ends drops the connections of all its workers at once: jitter spreads their return.
            await asyncio.sleep(backoff.pause_s(failures))

    async def _pause(self) -> None:
        await asyncio.sleep(_MIN_GAP_S)
        try:
            async with asyncio.timeout(max(self._heartbeat_s - _MIN_GAP_S, 0)):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    def _registration(self) -> Registration:
        status = self._status().model_dump()
        return Registration(worker_id=self._worker_id, url=self._url, version=_version(), region=self._region, **status)

    def _lost(self, why: str) -> None:
        # Each reason once: several URLs take turns at saying theirs.
        if self.registered or why not in self._said:
            log.warning("manager_lost" if self.registered else "manager_not_reached", reason=why)
            self._said.append(why)
        self.registered, self.trouble = False, why


def _is_refusal(error: InferqError) -> bool:
    """Whether the answer will not become another by itself."""
    return isinstance(error, AuthenticationFailed | BadRequest)


def _version() -> str:
    try:
        return version("inferq")
    except PackageNotFoundError:
        return ""
