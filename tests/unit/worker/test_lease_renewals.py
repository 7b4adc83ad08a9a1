"""The thread that renews leases."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest

from broker import Renewer
from queue_schemas import SessionId
from tests.support.waiting import eventually
from worker import lease_renewals
from worker.core import LoopWatchdog
from worker.lease_renewals import LeaseRenewals


class CountingRenewer:
    """Counts renewals."""

    def __init__(self) -> None:
        self.renewed = 0
        self.closed = False

    async def renew(self, session_id: SessionId) -> None:
        self.renewed += 1

    async def close(self) -> None:
        self.closed = True


@asynccontextmanager
async def renewing(
    lease_s: float, *, engine_alive: bool = True
) -> AsyncIterator[tuple[LeaseRenewals, CountingRenewer]]:
    renewer = CountingRenewer()
    watchdog = LoopWatchdog(time.monotonic(), 60.0, engine_alive=engine_alive)
    renewals = LeaseRenewals(cast(Renewer, renewer), SessionId("w.0123456789abcdef"), watchdog, lease_s)
    task = asyncio.create_task(renewals.run())
    try:
        yield renewals, renewer
    finally:
        task.cancel()
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 5)
        assert renewer.closed


async def test_a_ping_is_answered_and_a_stop_heeded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither waits for the thread's next look at its watchdog."""
    monkeypatch.setattr(lease_renewals, "POLL_S", 60.0)
    async with renewing(lease_s=600) as (renewals, renewer):
        await eventually(lambda: renewer.renewed == 1, "the first renewal")
        for count in (2, 3):
            renewals.answer_ping()
            await eventually(lambda count=count: renewer.renewed == count, "an answer")  # type: ignore[misc]


async def test_a_ping_that_may_not_be_answered_keeps_nothing_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the engine is stuck nothing is renewed, and the thread sleeps between its looks."""
    monkeypatch.setattr(lease_renewals, "POLL_S", 0.02)
    async with renewing(lease_s=600, engine_alive=False) as (renewals, renewer):
        renewals.answer_ping()
        before = time.process_time()
        await asyncio.sleep(0.3)
        assert time.process_time() - before < 0.2
        assert not renewer.renewed
