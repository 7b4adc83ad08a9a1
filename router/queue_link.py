"""Keeps the Router connected to the queue, and its model directory up to date."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import ValidationError

from queue_schemas import (
    AuthenticationFailed,
    BrokerUnavailable,
    BrokerUnsuitable,
    InferqError,
    SessionId,
    new_session_id,
)
from queue_schemas.fleet.acting_manager import ActingManager
from telemetry import get_logger
from telemetry.backoff import Backoff

from .model_directory import Directory, build_directory
from .ports import Deliver, OpenQueue, QueuePort
from .settings import RouterSettings

if TYPE_CHECKING:
    from queue_schemas import WorkerInfo

_BACKOFF = Backoff(0.1, 2.0)
DECLARE_INTERVAL_S = 600.0
MIN_REFRESH_GAP_S = 0.1
REFRESH_WAIT_S = 2.0
SERVER_CHECK_INTERVAL_S = 2.0

log = get_logger(__name__)


class QueueLink:
    """Connects and reconnects in :meth:`run`. ``queue`` is None while it is not connected; ``reasons`` say why."""

    def __init__(
        self,
        settings: RouterSettings,
        open_queue: OpenQueue,
        deliver: Deliver,
        on_lost_replies: Callable[[int], None],
        on_disconnect: Callable[[InferqError], None],
        on_acting_manager: Callable[[ActingManager], None] | None = None,
    ) -> None:
        """``deliver`` gets what arrives on the reply streams; ``on_lost_replies`` is called when entries of a shard's
        stream were lost, ``on_disconnect`` when the connection was lost: what waits on it gets no reply.
        ``on_acting_manager`` gets the acting Manager's record with each refresh of the directory."""
        self._settings = settings
        self._open = open_queue
        self._deliver = deliver
        self._on_lost_replies = on_lost_replies
        self._on_disconnect = on_disconnect
        self._on_acting_manager = on_acting_manager
        self._fault = "not connected to the queue yet"
        self._logged = ""
        self._stale = ""
        self._server_faults: list[str] = []
        self._declared_s = float("-inf")
        self._refresh_wanted = asyncio.Event()
        self._refreshed = asyncio.Event()
        self._refreshed_s = float("-inf")
        self._adapter_sets: dict[str, frozenset[str]] = {}
        self.queue: QueuePort | None = None
        self.directory = Directory()
        self.session_id = SessionId("")

    @property
    def reasons(self) -> list[str]:
        """Why no request can be accepted, as clients may read it; empty if it can."""
        if self.queue is None:
            return [self._fault]
        if not self.queue.replies.ready.is_set():
            return ["the reply streams are not open yet"]
        return self._server_faults or ([self._stale] if self._stale else [])

    def ready_queue(self) -> QueuePort:
        """The queue, if requests may be enqueued; else raises ``BrokerUnavailable`` that says why not."""
        if self.queue is not None and self.queue.replies.ready.is_set():
            return self.queue
        why = f"the queue cannot be reached: {self.reasons[0]}; try again shortly"
        raise BrokerUnavailable(why, retry_after_s=2, public=why)

    @property
    def round_trips(self) -> int:
        return self.queue.round_trips if self.queue is not None else 0

    async def run(self) -> None:
        """Connect, and connect again, until cancelled.

        Raises ``BrokerUnsuitable`` or ``AuthenticationFailed`` if the first connection fails because Redis cannot be
        used or the Manager refuses our join token: an operator has to fix that. Later it waits for a Redis to become
        usable again (it may be a replica after a failover) and for a token to be accepted again.
        """
        never, failures = True, 0
        while True:
            try:
                queue = await self._open()
            except InferqError as error:
                self._note(error)
                if never and isinstance(error, BrokerUnsuitable | AuthenticationFailed):
                    raise
                failures += 1
                await asyncio.sleep(_BACKOFF.pause_s(failures))
                continue
            never, failures = False, 0
            try:
                await self._use(queue)
            except* InferqError as group:
                fault = next(error for error in _leaves(group))
                self._note(fault)
                self._on_disconnect(fault)
            finally:
                self.queue = None
                await queue.close()
            await asyncio.sleep(_BACKOFF.pause_s(1))

    async def _use(self, queue: QueuePort) -> None:
        self.session_id = new_session_id(self._settings.router_id)
        self.queue = queue
        log.info("queue_connected", router=self.session_id)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(queue.replies.read(self.session_id, self._deliver, self._on_lost_replies), name="replies")
            tasks.create_task(self._keep_directory(queue), name="directory")
            tasks.create_task(self._check_servers(queue), name="the queue's servers")

    async def _check_servers(self, queue: QueuePort) -> None:
        """Check now and then whether the queue's servers are still fit."""
        while True:
            self._server_faults = await queue.server_faults()
            await asyncio.sleep(SERVER_CHECK_INTERVAL_S)

    def _note(self, fault: InferqError) -> None:
        if fault.message != self._logged:
            log.warning("queue_unreachable", error=fault.message)
        self._logged, self._fault = fault.message, fault.public

    async def fresh_directory(self) -> Directory:
        """The directory, read again now; the old one if that takes too long."""
        if self.queue is not None:
            done = self._refreshed
            self._refresh_wanted.set()
            try:
                async with asyncio.timeout(REFRESH_WAIT_S):
                    await done.wait()
            except TimeoutError:
                log.warning("directory_refresh_slow")
        return self.directory

    async def _keep_directory(self, queue: QueuePort) -> None:
        while True:
            await self._refresh(queue)
            try:
                async with asyncio.timeout(self._settings.directory_interval_ms / 1000):
                    await self._refresh_wanted.wait()
            except TimeoutError:
                pass  # the next refresh is due
            else:
                # However many requests name unknown models, Redis is not read more often than this.
                await asyncio.sleep(max(0.0, self._refreshed_s + MIN_REFRESH_GAP_S - time.monotonic()))
            self._refresh_wanted.clear()

    async def _refresh(self, queue: QueuePort) -> None:
        await self._declare(queue)
        await self._find_acting_manager(queue)
        try:
            fleet: dict[str, WorkerInfo] = await queue.fleet.load_workers()
            remembered = await queue.known_pools.remembered()
            await self._load_adapter_sets(queue, {info.adapter_set for info in fleet.values() if info.adapter_set})
        except InferqError as error:
            if error.public != self._stale:
                log.warning("directory_not_read", error=error.message)
            self._stale = error.public
        except (ValidationError, ValueError) as error:
            # Written by a Manager of another version: keep the directory that was read before.
            log.warning("directory_invalid", error=str(error))
        else:
            self._stale = ""
            self.directory = build_directory(
                fleet.values(),
                remembered.known,
                self._settings.pools,
                self.directory,
                int(time.time()),
                scaled=remembered.scaled,
                adapter_sets=self._adapter_sets,
            )
        self._refreshed_s = time.monotonic()
        done, self._refreshed = self._refreshed, asyncio.Event()
        done.set()

    async def _load_adapter_sets(self, queue: QueuePort, names: set[str]) -> None:
        """Read the sets of adapters that are new; most fleets have few, which seldom change."""
        kept = {name: adapters for name, adapters in self._adapter_sets.items() if name in names}
        self._adapter_sets = kept | await queue.fleet.load_adapter_sets(names - kept.keys())

    async def _find_acting_manager(self, queue: QueuePort) -> None:
        if self._on_acting_manager is None:
            return
        try:
            self._on_acting_manager(await queue.fleet.acting_manager())
        except InferqError as error:
            # Calls still go to the last known acting Manager, or to the configured ones.
            log.debug("acting_manager_not_read", error=error.message)

    async def _declare(self, queue: QueuePort) -> None:
        """Publish the models that the settings declare; this Router knows them even if that fails."""
        if not self._settings.pools or time.monotonic() - self._declared_s < DECLARE_INTERVAL_S:
            return
        try:
            await queue.known_pools.remember(self._settings.pools, declared=True)
        except InferqError as error:
            log.warning("pools_not_declared", error=error.message)
        self._declared_s = time.monotonic()


def _leaves(group: BaseExceptionGroup[InferqError]) -> list[InferqError]:
    leaves: list[InferqError] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves
