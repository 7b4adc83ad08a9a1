"""The directory of models: read when its time has come, or when somebody asks, and then no more."""

from __future__ import annotations

import asyncio

import pytest

from queue_schemas import WorkerInfo
from router import queue_link
from tests.unit.router.fakes import FakeQueue, router


class CountingQueue(FakeQueue):
    """Counts how often the fleet is read."""

    reads = 0

    async def load_workers(self) -> dict[str, WorkerInfo]:
        self.reads += 1
        return await super().load_workers()


async def test_a_directory_that_was_asked_for_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wish for a fresh directory is fulfilled by the next reading; it does not keep Redis busy after that."""
    monkeypatch.setattr(queue_link, "LEAST_REFRESH_GAP_S", 0.0)
    queue = CountingQueue("m")

    async def let_others_run() -> None:
        for _ in range(100):
            await asyncio.sleep(0)

    async with router(queue, directory_ms=60_000) as app:
        await let_others_run()
        before = queue.reads
        await app.state.link.fresh_directory()
        await let_others_run()
        assert queue.reads == before + 1
