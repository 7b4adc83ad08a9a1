"""Ends one Router without losing work: asks clients to leave, waits for open requests, fails what is left in time."""

from __future__ import annotations

import asyncio

from queue_schemas import ShuttingDown
from telemetry import get_logger

from .files.transfers import Transfers
from .inference.cancellation import Canceller
from .inference.open_requests import OpenRequests
from .lifecycle import RETRY_AFTER_SHUTDOWN_S, Lifecycle

FINAL_SENDS_S = 2.0
"""How long the last errors may take to reach clients, and the last cancels the queue."""
_POLL_S = 0.05
"""How often a leaving Router checks whether the answers that began before it left are complete."""

log = get_logger(__name__)


class GracefulShutdown:
    """:meth:`leave`, then :meth:`drain`: ``lame_duck_ms`` and ``shutdown_timeout_ms`` at most, together."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        requests: OpenRequests,
        transfers: Transfers,
        canceller: Canceller,
        *,
        lame_duck_s: float,
        limit_s: float,
        hurry: asyncio.Event,
    ) -> None:
        """``hurry`` is set to end open work at once (a second signal)."""
        self._lifecycle = lifecycle
        self._requests = requests
        self._transfers = transfers
        self._canceller = canceller
        self._lame_duck_s = lame_duck_s
        self._limit_s = limit_s
        self._hurry = hurry
        self._idle = asyncio.Event()
        self._one_drain = asyncio.Lock()
        self._drain_by_s = float("inf")

    def work_ended(self) -> None:
        """A request or a file transfer is over: called for each."""
        if self._lifecycle.draining and not self._busy:
            self._idle.set()

    async def leave(self) -> None:
        """For ``lame_duck_ms``: serve on, but say on /readyz and with each answer that clients should go elsewhere.

        Answers that began earlier did not say so, and clients will use their connections again: the time runs from the
        end of the last of them.
        """
        time = asyncio.get_running_loop().time
        self._lifecycle.leaving = True
        began_earlier = self._requests.now_open()
        until = time() + self._lame_duck_s
        self._drain_by_s = until + self._limit_s
        while (now := time()) < until and not self._hurry.is_set():
            await asyncio.sleep(min(until - now, _POLL_S))
            if not began_earlier.isdisjoint(self._requests.now_open()):
                until = min(time() + self._lame_duck_s, self._drain_by_s)

    async def drain(self) -> None:
        """Refuse new work, let open work finish within the limit, end the rest with an error, and send the cancels.

        Call it again once the server has ended: the requests that this cut off leave cancels to send.
        """
        async with self._one_drain:
            self._lifecycle.draining = True
            await self._drain()

    async def _drain(self) -> None:
        limit_s = max(0.0, min(self._limit_s, self._drain_by_s - asyncio.get_running_loop().time()))
        if self._busy:
            log.info("draining", open_requests=len(self._requests), transfers=self._transfers.open, limit_s=limit_s)
            if not await self._idle_within(limit_s, self._hurry):
                await self._fail_open_requests()
        try:
            async with asyncio.timeout(FINAL_SENDS_S):
                await self._canceller.settled()
        except TimeoutError:
            log.warning("cancels_not_sent", limit_s=FINAL_SENDS_S)

    async def _fail_open_requests(self) -> None:
        log.warning("drain_cut_short", open_requests=len(self._requests), transfers=self._transfers.open)
        self._requests.fail_all(
            ShuttingDown(
                "this router shut down before the answer was complete; ask another one for the rest if it is kept, or "
                "else send the request again",
                retry_after_s=RETRY_AFTER_SHUTDOWN_S,
            )
        )
        await self._idle_within(FINAL_SENDS_S if len(self._requests) else 0)

    async def _idle_within(self, limit_s: float, *or_events: asyncio.Event) -> bool:
        """Whether nothing is open any more, after ``limit_s`` or as soon as one of ``or_events`` is set."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._idle, *or_events)]
        try:
            await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return not self._busy

    @property
    def _busy(self) -> bool:
        return len(self._requests) > 0 or self._transfers.open > 0
