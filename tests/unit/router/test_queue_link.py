"""The directory of models: read when its time has come, or when somebody asks, and then no more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection

import pytest

from queue_schemas import AuthenticationFailed, BrokerUnsuitable, InferqError, WorkerInfo
from router import RouterSettings, queue_link
from router.queue_link import QueueLink
from telemetry.backoff import Backoff
from tests.support.waiting import eventually
from tests.unit.router.fakes import FakeQueue, router, worker


class CountingQueue(FakeQueue):
    """Counts how often the fleet is read."""

    reads = 0

    async def load_workers(self) -> dict[str, WorkerInfo]:
        self.reads += 1
        return await super().load_workers()


async def test_concurrent_refreshes_read_the_directory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wish for a fresh directory is fulfilled by the next reading; it does not keep Redis busy after that."""
    monkeypatch.setattr(queue_link, "MIN_REFRESH_GAP_S", 0.0)
    queue = CountingQueue("m")

    async def let_others_run() -> None:
        for _ in range(100):
            await asyncio.sleep(0)

    async with router(queue, directory_interval_ms=60_000) as app:
        await let_others_run()
        before = queue.reads
        await app.services.link.fresh_directory()
        await let_others_run()
        assert queue.reads == before + 1


def _opening(*answers: FakeQueue | InferqError) -> Callable[[], Awaitable[FakeQueue]]:
    """What opens the queue: these answers one after the other, the last one for ever."""
    left = list(answers)

    async def open_queue() -> FakeQueue:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, InferqError):
            raise answer
        return answer

    return open_queue


def _link(*answers: FakeQueue | InferqError) -> QueueLink:
    return QueueLink(
        RouterSettings.load(), _opening(*answers), lambda news: None, lambda shard: None, lambda error: None
    )


@pytest.mark.parametrize("refusal", [AuthenticationFailed("wrong join token"), BrokerUnsuitable("a replica")])
async def test_a_first_refusal_ends_the_link_and_a_later_one_is_retried(
    monkeypatch: pytest.MonkeyPatch, refusal: InferqError
) -> None:
    """A refusal at the start is for an operator to fix; a Router that has served reports why it does not, and goes on
    as soon as it can."""
    monkeypatch.setattr(queue_link, "_BACKOFF", Backoff(0.01, 2.0))
    with pytest.raises(type(refusal)):
        await _link(refusal).run()
    first, last = FakeQueue("m"), FakeQueue("m")
    first.break_replies()
    link = _link(first, *[refusal] * 5, last)
    running = asyncio.create_task(link.run())
    await eventually(lambda: link.reasons == [refusal.message], "it says why", every_s=0.001)
    await eventually(lambda: link.queue is last and not link.reasons, "it is connected again")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_server_that_becomes_unfit_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """[G6] What the look at the queue's servers finds makes the Router not ready, until it is put right; requests are
    taken as long as the queue takes them."""
    monkeypatch.setattr(queue_link, "SERVER_CHECK_INTERVAL_S", 0.01)
    found: list[str] = []

    class Vetted(FakeQueue):
        async def server_faults(self) -> list[str]:
            return list(found)

    async with router(Vetted("m")) as app:
        link = app.services.link
        await eventually(lambda: not link.reasons, "it is ready")
        found.append("Redis would evict waiting jobs")
        await eventually(lambda: link.reasons == found, "it is said")
        assert link.ready_queue() is link.queue
        found.clear()
        await eventually(lambda: not link.reasons, "it is forgiven")


async def test_sets_of_adapters_are_read_when_they_are_new() -> None:
    """Not with each refresh; those that no worker has any more are forgotten."""
    asked: list[set[str]] = []

    class Queue(FakeQueue):
        async def load_adapter_sets(self, names: Collection[str]) -> dict[str, frozenset[str]]:
            asked.append(set(names))
            return {name: frozenset({f"of-{name[0]}"}) for name in names}

    def have(queue: Queue, *names: str) -> None:
        queue.workers = {
            name: worker("base").model_copy(update={"worker_id": name, "adapter_set": name}) for name in names
        }

    queue, first, second = Queue("base"), "1" * 32, "2" * 32
    async with router(queue, directory_interval_ms=60_000) as app:
        have(queue, first, second)
        directory = await app.services.link.fresh_directory()
        assert list(directory.pools) == ["base", "of-1", "of-2"]
        have(queue, second)
        directory = await app.services.link.fresh_directory()
        assert list(directory.pools) == ["base", "of-2"]
        have(queue, first)
        await app.services.link.fresh_directory()
    assert [names for names in asked if names] == [{first, second}, {first}]
