"""Renew the leases of one worker session from a thread of their own.

The loop that serves jobs may be busy for longer than a lease while process and engine are well: that must not cost the
leases. So another thread, with an event loop and a connection of its own, raises the renewal counter as long as
:class:`~worker.core.LoopWatchdog` allows. While the serving loop is late it renews so often that every ping finds the
counter risen, though nobody has read the ping.
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
from .over_http.workers import HttpRenewer

RENEWALS_PER_LEASE = 5
POLL_S = 0.1
"""How often the watchdog is read: with the time until a loop counts as late, well within a ping's half second."""
RETRY_S = 0.5
END_TIMEOUT_S = 5.0

log = get_logger(__name__)


class LeaseRenewals:
    """Keeps the leases of ``session_id`` while ``watchdog`` allows it. ``renewer`` is used and closed in the thread."""

    def __init__(
        self, renewer: Renewer | HttpRenewer, session_id: SessionId, watchdog: LoopWatchdog, lease_s: float
    ) -> None:
        self._renewer = renewer
        self._session_id = session_id
        self._watchdog = watchdog
        self._interval_s = lease_s / RENEWALS_PER_LEASE
        self._pinged = threading.Event()
        self._stopping = threading.Event()
        self._woken = threading.Event()
        """Ends a pause: one of the two above was set."""
        self._due_at = 0.0
        self._paused = False

    def answer_ping(self) -> None:
        """Renew at once. From any thread."""
        self._pinged.set()
        self._woken.set()

    async def run(self) -> None:
        """Renew until cancelled. Raises ``Fenced`` when the session was declared dead."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[BaseException | None] = loop.create_future()

        def notify(error: BaseException | None) -> None:
            if not ended.done():
                ended.set_result(error)

        def renew() -> None:
            error: BaseException | None = None
            try:
                asyncio.run(self._renew())
            except BaseException as failure:  # noqa: BLE001 - handed over to the serving loop
                error = failure
            with contextlib.suppress(RuntimeError):  # the serving loop is gone, and its tasks with it
                loop.call_soon_threadsafe(notify, error)

        # A daemon: a process that ends in a hurry does not wait for it.
        threading.Thread(target=renew, name="lease renewals", daemon=True).start()
        try:
            error = await asyncio.shield(ended)
        finally:
            self._stopping.set()
            self._woken.set()
            if not ended.done():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(END_TIMEOUT_S):
                        await asyncio.shield(ended)
        if error is not None:
            raise error

    async def _renew(self) -> None:
        try:
            while not self._stopping.is_set():
                if self._is_due(time.monotonic()):
                    await self._renew_once()
                # It stops the thread's own loop, which has nothing else to do, and costs a fifth of a turn of that.
                self._woken.wait(POLL_S)
                self._woken.clear()
        finally:
            await self._renewer.close()

    def _is_due(self, now: float) -> bool:
        """Whether to renew now; logs once that the serving loop is stuck."""
        watchdog = self._watchdog
        if not watchdog.may_renew(now):
            if not self._paused and watchdog.stuck(now):
                log.error("serving_loop_stuck", timeout_s=watchdog.loop_stall_timeout_s, then="its jobs go to others")
            self._paused = True
            return False
        self._paused = False
        pinged = self._pinged.is_set()
        if pinged:  # cleared without it, a ping that comes between the two lines would be lost
            self._pinged.clear()
        return pinged or watchdog.late(now) or now >= self._due_at

    async def _renew_once(self) -> None:
        started_at = time.monotonic()
        for _ in range(2):  # the loop stood still: it may find that the connection was closed meanwhile
            await asyncio.sleep(0)
        try:
            await self._renewer.renew(self._session_id)
        except Fenced:
            raise
        except InferqError as error:
            # Whatever Redis says short of a verdict on this session, it may say otherwise soon.
            log.warning("leases_not_renewed", error=error.message)
            self._due_at = started_at + RETRY_S
            await asyncio.sleep(RETRY_S)
        else:
            self._due_at = started_at + self._interval_s
