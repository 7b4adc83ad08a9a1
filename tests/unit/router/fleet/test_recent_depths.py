"""Depths for the pages of pools: read seldom, however often they are asked for."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from queue_schemas import BrokerUnavailable
from router.fleet import recent_depths
from router.fleet.recent_depths import RecentDepths


class Stats:
    """Counts reads, each answered once ``go_on`` is set."""

    def __init__(self) -> None:
        self.reads = 0
        self.go_on = asyncio.Event()
        self.error: Exception | None = None

    async def depths(self) -> Any:
        self.reads += 1
        read = self.reads
        await self.go_on.wait()
        if self.error is not None:
            raise self.error
        return {"read": read}


def over(stats: Stats) -> RecentDepths:
    return RecentDepths(SimpleNamespace(ready_queue=lambda: SimpleNamespace(stats=stats)))  # type: ignore[arg-type]


async def test_all_who_ask_at_once_share_a_read_and_may_leave() -> None:
    """One that goes away does not take the answer along."""
    stats = Stats()
    recent = over(stats)
    askers = [asyncio.create_task(recent.get()) for _ in range(100)]
    await asyncio.sleep(0)
    askers[0].cancel()
    await asyncio.sleep(0)
    stats.go_on.set()
    assert await asyncio.gather(*askers[1:]) == [{"read": 1}] * 99
    assert stats.reads == 1


async def test_an_old_read_is_not_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment later another one is made."""
    monkeypatch.setattr(recent_depths, "MAX_AGE_S", 0.05)
    stats = Stats()
    stats.go_on.set()
    recent = over(stats)
    assert [await recent.get(), await recent.get()] == [{"read": 1}] * 2
    await asyncio.sleep(0.06)
    assert await recent.get() == {"read": 2}


async def test_an_error_is_not_kept() -> None:
    """The next one who asks tries again."""
    stats = Stats()
    stats.go_on.set()
    stats.error = BrokerUnavailable("Redis is away")
    recent = over(stats)
    with pytest.raises(BrokerUnavailable):
        await recent.get()
    stats.error = None
    assert await recent.get() == {"read": 2}
