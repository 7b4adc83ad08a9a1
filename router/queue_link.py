"""The Router's link to the queue: connected whenever it can be, and the directory of models that is read over it."""

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
DECLARE_EVERY_S = 600.0
MIN_REFRESH_GAP_S = 0.1
REFRESH_WAIT_S = 2.0
VET_EVERY_S = 2.0

log = get_logger(__name__)


class QueueLink:
    """Connects (:meth:`run`), and says whether it is: ``queue`` is None while there is none, ``reasons`` say why."""

    def __init__(
        self,
        settings: RouterSettings,
        open_queue: OpenQueue,
        deliver: Deliver,
        lost: Callable[[int], None],
        broken: Callable[[InferqError], None],
        heard: Callable[[ActingManager], None] | None = None,
    ) -> None:
        """``broken`` is told when a link that stood has to be made anew: what waits on it gets no answer. ``heard`` is
        told with each refresh of the directory what Redis says of the acting Manager."""
        self._settings = settings
        self._open = open_queue
        self._deliver = deliver
        self._lost = lost
        self._broken = broken
        self._heard = heard
        self._fault = "not connected to the queue yet"
        self._logged = ""
        self._stale = ""
        self._server_faults: list[str] = []
        self._declared_s = float("-inf")
        self._refresh_wanted = asyncio.Event()
        self._refreshed = asyncio.Event()
        self._refreshed_s = float("-inf")
        self.queue: QueuePort | None = None
        self.directory = Directory()
        self.session_id = SessionId("")

    @property
    def reasons(self) -> list[str]:
        """Why no request can be taken, as clients are told; none: it can."""
        if self.queue is None:
            return [self._fault]
        if not self.queue.replies.ready.is_set():
            return ["the reply streams are not open yet"]
        return self._server_faults or ([self._stale] if self._stale else [])

    def ready_queue(self) -> QueuePort:
        """The queue, if requests may be put on it; else ``BrokerUnavailable`` that says why not."""
        if self.queue is not None and self.queue.replies.ready.is_set():
            return self.queue
        why = f"the queue cannot be reached: {self.reasons[0]}; try again shortly"
        raise BrokerUnavailable(why, retry_after_s=2, public=why)

    @property
    def round_trips(self) -> int:
        return self.queue.round_trips if self.queue is not None else 0

    async def run(self) -> None:
        """Connect, and connect again, until cancelled.

        Raises ``BrokerUnsuitable`` or ``AuthenticationFailed`` if it never was connected and Redis cannot be used, or
        the Manager refuses our join token: that is for somebody to mend. A Redis that was fit and is no more (a replica
        after a failover) and a token that was right are waited for.
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
                self._broken(fault)
            finally:
                self.queue = None
                await queue.close()
            await asyncio.sleep(_BACKOFF.pause_s(1))

    async def _use(self, queue: QueuePort) -> None:
        self.session_id = new_session_id(self._settings.router_id)
        self.queue = queue
        log.info("queue_connected", router=self.session_id)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(queue.replies.read(self.session_id, self._deliver, self._lost), name="replies")
            tasks.create_task(self._keep_directory(queue), name="directory")
            tasks.create_task(self._vet(queue), name="the queue's servers")

    async def _vet(self, queue: QueuePort) -> None:
        """Look whether the queue's servers are still fit."""
        while True:
            self._server_faults = await queue.server_faults()
            await asyncio.sleep(VET_EVERY_S)

    def _note(self, fault: InferqError) -> None:
        if fault.message != self._logged:
            log.warning("queue_not_connected", error=fault.message)
        self._logged, self._fault = fault.message, fault.public

    async def fresh_directory(self) -> Directory:
        """The directory, read again from now on; the old one if that takes too long."""
        if self.queue is not None:
            done = self._refreshed
            self._refresh_wanted.set()
            try:
                async with asyncio.timeout(REFRESH_WAIT_S):
                    await done.wait()
            except TimeoutError:
                log.warning("directory_slow")
        return self.directory

    async def _keep_directory(self, queue: QueuePort) -> None:
        while True:
            await self._refresh(queue)
            try:
                async with asyncio.timeout(self._settings.directory_interval_ms / 1000):
                    await self._refresh_wanted.wait()
            except TimeoutError:
                pass  # its time has come anyway
            else:
                # However many ask for models that do not exist, Redis is not asked more often than this.
                await asyncio.sleep(max(0.0, self._refreshed_s + MIN_REFRESH_GAP_S - time.monotonic()))
            self._refresh_wanted.clear()

    async def _refresh(self, queue: QueuePort) -> None:
        await self._declare(queue)
        await self._look_for_manager(queue)
        try:
            fleet: dict[str, WorkerInfo] = await queue.fleet.load_workers()
            remembered = await queue.fleet.known_pools()
        except InferqError as error:
            if error.public != self._stale:
                log.warning("directory_not_read", error=error.message)
            self._stale = error.public
        except (ValidationError, ValueError) as error:
            # Written by a Manager of another version: the directory at hand is better than none.
            log.warning("directory_not_understood", error=str(error))
        else:
            self._stale = ""
            self.directory = build_directory(
                fleet.values(), remembered, self._settings.pools, self.directory, int(time.time())
            )
        self._refreshed_s = time.monotonic()
        done, self._refreshed = self._refreshed, asyncio.Event()
        done.set()

    async def _look_for_manager(self, queue: QueuePort) -> None:
        if self._heard is None:
            return
        try:
            self._heard(await queue.fleet.acting_manager())
        except InferqError as error:
            # Calls go on to where it was last, or to the configured ones.
            log.debug("acting_manager_not_read", error=error.message)

    async def _declare(self, queue: QueuePort) -> None:
        """Tell others which models the settings declare; this Router knows them whether or not that succeeds."""
        if not self._settings.pools or time.monotonic() - self._declared_s < DECLARE_EVERY_S:
            return
        try:
            await queue.fleet.remember_pools(self._settings.pools, declared=True)
        except InferqError as error:
            log.warning("pools_not_declared", error=error.message)
        self._declared_s = time.monotonic()


def _leaves(group: BaseExceptionGroup[InferqError]) -> list[InferqError]:
    leaves: list[InferqError] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves
