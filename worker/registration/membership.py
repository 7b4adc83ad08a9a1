"""Register a worker session with a Manager, keep it registered by heartbeats, and hold its session connection.

One URL after the other is tried. Running jobs do not depend on it: while no Manager answers, jobs are claimed by the
last assignment.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn, Protocol

from queue_schemas import (
    Assignment,
    AuthenticationFailed,
    BadRequest,
    Fenced,
    Heartbeat,
    InferqError,
    PermissionRefused,
    Registration,
    RegistrationAnswer,
    SessionId,
    UnknownWorker,
    WorkerIdTaken,
    WorkerStatus,
)
from telemetry import get_logger
from telemetry.backoff import Backoff

from ..engines.adapter_folder import AdapterFolder
from ..metrics import WorkerMetrics
from .manager_client import ManagerClient

_BACKOFF = Backoff(0.2, 2.0)
_TAKEN_TRIES = 6
_TAKEN_PAUSE_S = 0.5
"""A worker that was restarted at once waits for its previous session to be declared dead: 3 s in all."""
_MIN_GAP_S = 0.1
_STABLE_CONNECTION_S = 10.0
_CONNECTION_BACKOFF = Backoff(0.3, 15.0)
_UNSUPPORTED_BACKOFF = Backoff(450.0, 450.0)
"""How long a worker waits before it asks again where session connections are not supported."""
_MAX_REASONS_LOGGED = 32

log = get_logger(__name__)


class Assigned(Protocol):
    """Takes an assignment. ``registered``: it answers a registration, so it replaces the one before in any case."""

    def __call__(self, assignment: Assignment, *, registered: bool) -> None: ...


class Membership:
    """Registers one session and keeps it registered.

    ``loadable``: the models of which its engine could serve another one; ``adapters``: those that it could load while
    it serves the first of these. ``status()`` is what heartbeats report; ``assigned`` and ``drain`` are called with
    what the answers ask for.
    """

    def __init__(
        self,
        client: ManagerClient,
        worker_id: str,
        *,
        url: str | None,
        region: str,
        loadable: Sequence[str],
        adapters: AdapterFolder | None = None,
        metrics: WorkerMetrics,
        status: Callable[[], WorkerStatus],
        assigned: Assigned,
        drain: Callable[[], None],
    ) -> None:
        self._client = client
        self._worker_id = worker_id
        self._url = url
        self._region = region
        self._loadable = loadable
        self._adapters = adapters
        self._metrics = metrics
        self._status = status
        self._assigned = assigned
        self._drain = drain
        self._changed = asyncio.Event()
        self._must_register = False
        self._heartbeat_s = 2.0
        self._logged: deque[str] = deque(maxlen=_MAX_REASONS_LOGGED)
        self.registered = False
        self.problem = "not registered with a Manager yet"
        """Why it is not registered, for people; empty when it is."""

    def notify(self) -> None:
        """Something the Manager should know has changed: send a heartbeat soon."""
        self._changed.set()

    def register_again(self) -> None:
        """Something that only registrations say has changed: register once more, soon."""
        self._must_register = True
        self._changed.set()

    async def register(self, *, first: bool) -> RegistrationAnswer:
        """Register, trying until a Manager accepts.

        Raises ``WorkerIdTaken`` when another worker holds the id for 3 s and, the ``first`` time, what waiting
        cannot fix: ``AuthenticationFailed``, ``PermissionRefused``, ``BadRequest``. With several URLs that is raised
        once each has refused:
        one that does not answer yet may still accept this worker.
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
                self._note_unregistered(error.message)
                self._client.turn()
                failures += 1
                await asyncio.sleep(_BACKOFF.pause_s(failures))
                continue
            self._heartbeat_s = answer.heartbeat_interval_ms / 1000
            self.registered, self.problem = True, ""
            self._logged.clear()
            log.info("registered", manager=self._client.url, pools=len(answer.assignment.pools))
            self._assigned(answer.assignment, registered=True)
            return answer

    async def run(self) -> NoReturn:
        """Send heartbeats until cancelled; register again when a Manager does not answer or does not know us. Raises
        ``Fenced`` if a Router says that the session was declared dead."""
        while True:
            await self._pause()
            if self._must_register:
                self._must_register = False
                await self.register(first=False)
                continue
            try:
                answer = await self._client.heartbeat(self._worker_id, Heartbeat(**self._status().model_dump()))
            except Fenced:  # only over HTTP, where a heartbeat renews leases
                raise
            except UnknownWorker as error:
                self._note_unregistered(error.message)
                await self.register(first=False)
            except InferqError as error:
                self._metrics.heartbeats_failed.inc()
                self._note_unregistered(error.message)
                self._client.turn()
                await self.register(first=False)
            else:
                self._assigned(answer.assignment, registered=False)
                if answer.drain:
                    self._drain()

    async def hold_session_connection(self, session_id: SessionId) -> NoReturn:
        """Hold a connection to the URL at which this worker is registered, until cancelled: when it breaks, the Manager
        checks at once whether this session is dead."""
        failures = 0
        while True:
            started_at = asyncio.get_running_loop().time()
            failures += 1
            backoff = _CONNECTION_BACKOFF
            try:
                await self._client.hold_session_connection(self._worker_id, session_id)
            except UnknownWorker:
                backoff = _UNSUPPORTED_BACKOFF
            except InferqError as error:
                log.debug("session_connection_broke", error=error.message)
            if asyncio.get_running_loop().time() - started_at > _STABLE_CONNECTION_S:
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
        return Registration(
            worker_id=self._worker_id,
            url=self._url,
            version=_version(),
            region=self._region,
            loadable=list(self._loadable),
            adapters=sorted(self._adapters.names) if self._adapters is not None else [],
            adapter_base=self._loadable[0] if self._adapters is not None and self._loadable else "",
            **status,
        )

    def _note_unregistered(self, why: str) -> None:
        # Each reason once: with several URLs the reasons alternate.
        if self.registered or why not in self._logged:
            log.warning("manager_lost" if self.registered else "manager_unreachable", reason=why)
            self._logged.append(why)
        self.registered, self.problem = False, why


def _is_refusal(error: InferqError) -> bool:
    """Whether waiting cannot change the answer."""
    return isinstance(error, AuthenticationFailed | PermissionRefused | BadRequest)


def _version() -> str:
    try:
        return version("inferq")
    except PackageNotFoundError:
        return ""
