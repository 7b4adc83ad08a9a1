"""Renewals: the leases of one session id are kept by a thread of their own.

The loop that serves jobs may be busy for longer than a lease while process and engine are well: what it runs must not
be lost for that. So another thread, with an event loop and a connection of its own, raises the renewal number as long
as :class:`~worker.core.LoopWatchdog` allows. While the serving loop is late it renews so often that every ping finds
the number risen, though nobody has read it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

from broker import Renewer
from queue_schemas import Fenced, InferqError, SessionId
from telemetry import get_logger

from .core import LoopWatchdog

RENEWALS_PER_LEASE = 5
LOOK_S = 0.1
"""How often the watchdog is looked at: with the time until a loop counts as late, well within a ping's half second."""
RETRY_S = 0.5
END_LIMIT_S = 5.0

log = get_logger(__name__)


class Renewals:
    """Keeps the leases of ``session_id`` while ``watchdog`` allows it. ``renewer`` is used and closed in the thread."""

    def __init__(self, renewer: Renewer, session_id: SessionId, watchdog: LoopWatchdog, lease_s: float) -> None:
        self._renewer = renewer
        self._session_id = session_id
        self._watchdog = watchdog
        self._interval_s = lease_s / RENEWALS_PER_LEASE
        self._pinged = threading.Event()
        self._stopping = threading.Event()
        self._due_at = 0.0
        self._complained = False

    def answer_ping(self) -> None:
        """Renew at once. From any thread."""
        self._pinged.set()

    async def run(self) -> None:
        """Renew until cancelled. Raises ``Fenced`` when the session id was declared dead."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[BaseException | None] = loop.create_future()

        def tell(error: BaseException | None) -> None:
            if not ended.done():
                ended.set_result(error)

        def live() -> None:
            error: BaseException | None = None
            try:
                asyncio.run(self._renew())
            except BaseException as failure:  # noqa: BLE001 - handed over to the serving loop
                error = failure
            with contextlib.suppress(RuntimeError):  # the serving loop is gone: so is whoever wanted to know
                loop.call_soon_threadsafe(tell, error)

        # A daemon: nobody waits for it in a process that ends in a hurry.
        threading.Thread(target=live, name="renewals", daemon=True).start()
        try:
            error = await asyncio.shield(ended)
        finally:
            self._stopping.set()
            if not ended.done():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(END_LIMIT_S):
                        await asyncio.shield(ended)
        if error is not None:
            raise error

    async def _renew(self) -> None:
        try:
            while not self._stopping.is_set():
                if self._is_due(time.monotonic()):
                    await self._renew_once()
                await asyncio.sleep(LOOK_S)
        finally:
            await self._renewer.close()

    def _is_due(self, now: float) -> bool:
        """Whether to renew now, and complain once about what forbids it."""
        watchdog = self._watchdog
        if not watchdog.may_renew(now):
            if not self._complained and watchdog.stuck(now):
                log.error("serving_loop_stuck", limit_s=watchdog.loop_limit_s, then="its jobs go to others")
            self._complained = True
            return False
        self._complained = False
        pinged = self._pinged.is_set()
        if pinged:  # cleared without it, a ping that comes between the two lines would be lost
            self._pinged.clear()
        return pinged or watchdog.late(now) or now >= self._due_at

    async def _renew_once(self) -> None:
        begun = time.monotonic()
        try:
            await self._renewer.renew(self._session_id)
        except Fenced:
            raise
        except InferqError as error:
            # Whatever Redis says short of a verdict on this session id, it may say otherwise soon.
            log.warning("leases_not_renewed", error=error.message)
            self._due_at = begun + RETRY_S
            await asyncio.sleep(RETRY_S)
        else:
            self._due_at = begun + self._interval_s
