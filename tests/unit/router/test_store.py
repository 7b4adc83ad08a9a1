"""Calls to the file store in threads: limited in number and time, and undone once abandoned."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from queue_schemas import CannotStart, OverCapacity, StoreUnavailable, Tenant
from router import RouterSettings, build_router
from router.store import MAX_PAGES_WAITING, WAITING_PER_THREAD, AsyncStore
from storage import ObjectStore, StorageSettings
from tests.support.waiting import eventually


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    """What calls that hang wait for."""
    event = threading.Event()
    yield event
    event.set()


def make_store(threads: int = 2, timeout_s: float = 5.0) -> AsyncStore:
    return AsyncStore(ObjectStore.open(StorageSettings(url="memory://unused")), threads=threads, timeout_s=timeout_s)


async def test_a_call_runs_in_a_thread_and_returns_its_error() -> None:
    """What a call answers or raises, its caller gets; the loop does not run it."""
    store = make_store()
    assert await store.run(threading.current_thread) is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        await store.run(lambda: 1 // 0)
    await store.close(1)


async def test_a_hanging_store_is_reported_and_its_calls_are_limited(hang: threading.Event) -> None:
    """A call past its limit is refused with 503, those that wait behind it too, and beyond the bound at once."""
    store = make_store(threads=1, timeout_s=0.05)
    with pytest.raises(StoreUnavailable, match="did not answer within"):
        await store.run(hang.wait)
    waiting = [asyncio.ensure_future(store.run(hang.wait)) for _ in range(WAITING_PER_THREAD - 1)]
    await asyncio.sleep(0)
    with pytest.raises(StoreUnavailable, match="more to do"):
        await store.run(hang.wait)
    assert all(isinstance(end, StoreUnavailable) for end in await asyncio.gather(*waiting, return_exceptions=True))
    hang.set()
    await eventually(lambda: store.open == 0, "the calls end")
    assert await store.run(lambda: 1) == 1
    await store.close(1)


async def test_lists_of_one_tenant_leave_the_store_to_others(hang: threading.Event) -> None:
    """[H23] Lists are read one at a time of each tenant: a hundred asked for at once hold one thread, what is too many
    is refused with 429, and another tenant's list and any single object are read meanwhile."""
    store = make_store(threads=2)
    greedy, other = Tenant("greedy"), Tenant("other")
    begun: list[int] = []

    def slow(number: int) -> int:
        begun.append(number)
        hang.wait()
        return number

    asked = [asyncio.ensure_future(store.read_page(greedy, lambda i=i: slow(i))) for i in range(100)]  # type: ignore[misc]
    await eventually(lambda: begun == [0], "the first page is being read")
    assert await store.read_page(other, lambda: "theirs") == "theirs"
    assert await store.run(lambda: "one object") == "one object"
    assert begun == [0]
    hang.set()
    ends = await asyncio.gather(*asked, return_exceptions=True)
    assert ends[: MAX_PAGES_WAITING + 1] == list(range(MAX_PAGES_WAITING + 1))
    assert {type(end) for end in ends[MAX_PAGES_WAITING + 1 :]} == {OverCapacity}
    await store.close(1)


async def test_a_tenant_never_uses_all_calls_of_a_slow_store(hang: threading.Event) -> None:
    """[H25] Of a store that answers slowly one tenant gets a quarter of the calls that may wait, then 429; another
    tenant's call is taken in, and so is the first one's once some have ended."""
    store = make_store(threads=2)
    greedy, other = Tenant("greedy"), Tenant("other")
    asked = [asyncio.ensure_future(store.run(hang.wait, tenant=greedy)) for _ in range(2 * WAITING_PER_THREAD)]
    await eventually(lambda: sum(each.done() for each in asked) > 0, "some are refused")
    last = asyncio.ensure_future(store.run(lambda: "theirs", tenant=other))
    await asyncio.sleep(0)
    assert not last.done()
    hang.set()
    assert await last == "theirs"
    ends = await asyncio.gather(*asked, return_exceptions=True)
    assert ends.count(True) == WAITING_PER_THREAD // 2
    assert {type(end) for end in ends if end is not True} == {OverCapacity}
    assert await store.run(lambda: "again", tenant=greedy) == "again"
    await store.close(1)


async def test_an_abandoned_call_is_undone(hang: threading.Event) -> None:
    """A call that ends after its caller gave up, by its limit or cancelled, is undone afterwards, not meanwhile."""
    store = make_store(timeout_s=0.5)
    begun: list[int] = []
    done: list[str] = []

    def write() -> None:
        begun.append(1)
        hang.wait()
        done.append("write")

    late = asyncio.ensure_future(store.run(write, undo=lambda: done.append("undo")))
    cancelled = asyncio.ensure_future(store.run(write, timeout_s=60, undo=lambda: done.append("undo")))
    await eventually(lambda: len(begun) == 2, "both are under way")
    cancelled.cancel()
    with pytest.raises(StoreUnavailable):
        await late
    assert done == []
    hang.set()
    await eventually(lambda: len(done) == 4, "both are undone")
    assert done[0] == "write"
    await store.close(1)


async def test_closing_waits_for_running_calls_until_its_timeout(hang: threading.Event) -> None:
    """Closing lets a clean-up finish; a store that hangs does not keep the Router."""
    store = make_store()
    done: list[int] = []
    store.in_background(lambda: done.append(1))
    store.in_background(lambda: 1 // 0)
    await store.close(5)
    assert done == [1]
    store.in_background(hang.wait)
    await store.close(0.05)


def test_an_invalid_store_url_keeps_the_router_from_starting() -> None:
    """A wrong setting is one sentence at the start; a store that is only away is not (see /v1/files)."""

    async def open_queue() -> None: ...

    with pytest.raises(CannotStart, match="give a folder"):
        build_router(RouterSettings(), None, StorageSettings(url="gopher://x/y"), open_queue=open_queue)  # type: ignore[arg-type]
