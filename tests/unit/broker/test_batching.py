"""Batches share round trips without delaying anyone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from broker.batching import MAX_BATCH_BYTES, MAX_BATCH_ITEMS, Batcher


class Recorder:
    """A sender that records its batches and answers each item with its double."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.sending = asyncio.Event()

    async def __call__(self, items: Sequence[int]) -> list[int | Exception]:
        self.batches.append(list(items))
        self.sending.set()
        await self.gate.wait()
        return [ValueError("odd one out") if item == 13 else item * 2 for item in items]


async def test_a_lone_call_goes_out_at_once_and_concurrent_ones_share_the_next_batch() -> None:
    """What gathers while a batch is on its way is the next batch."""
    send = Recorder()
    send.gate.clear()
    batcher = Batcher(send, lambda _: 1)
    first = batcher.submit(1)
    async with asyncio.timeout(5):
        await send.sending.wait()
    others = [batcher.submit(n) for n in range(2, 7)]
    await asyncio.sleep(0)
    send.gate.set()
    assert await asyncio.gather(first, *others) == [2, 4, 6, 8, 10, 12]
    assert send.batches == [[1], [2, 3, 4, 5, 6]]


async def test_a_full_batch_does_not_wait_for_the_one_before() -> None:
    """Two are on their way while more than a batch waits, no more; what is left gathers again."""
    send = Recorder()
    send.gate.clear()
    batcher = Batcher(send, lambda _: 1)
    calls = [batcher.submit(number) for number in range(1_000, 1_000 + 3 * MAX_BATCH_ITEMS)]
    for _ in range(5):
        await asyncio.sleep(0)
    assert [len(batch) for batch in send.batches] == [MAX_BATCH_ITEMS] * 2
    send.gate.set()
    assert await asyncio.gather(*calls) == [number * 2 for number in range(1_000, 1_000 + 3 * MAX_BATCH_ITEMS)]
    send.gate.clear()
    calls = [batcher.submit(number) for number in range(100)]
    await asyncio.sleep(0)
    calls += [batcher.submit(number) for number in range(100)]
    send.gate.set()
    await asyncio.gather(*calls, return_exceptions=True)
    assert list(map(len, send.batches[3:])) == [100, 100]


async def test_batches_are_bounded_in_items_and_bytes() -> None:
    """No batch passes the limits, except one item that is larger by itself."""
    send = Recorder()
    batcher = Batcher(send, lambda item: MAX_BATCH_BYTES * 2 if item == 0 else 10)
    await asyncio.gather(*(batcher.submit(n) for n in (*range(100, 400), 0, 400)))
    assert max(map(len, send.batches)) <= MAX_BATCH_ITEMS
    assert [0] in send.batches


async def test_an_exception_as_answer_reaches_only_its_caller() -> None:
    """One refused item does not fail its neighbours."""
    batcher = Batcher(Recorder(), lambda _: 1)
    answers = await asyncio.gather(*(batcher.submit(n) for n in (1, 13, 2)), return_exceptions=True)
    assert answers[0] == 2
    assert isinstance(answers[1], ValueError)
    assert answers[2] == 4


async def test_an_error_of_the_sender_reaches_every_caller_and_the_next_batch_goes_out() -> None:
    """A failed round trip is nobody's silence."""
    calls = 0

    async def send(items: Sequence[int]) -> list[int | Exception]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ConnectionError("gone")
        return list(items)

    batcher = Batcher(send, lambda _: 1)
    failed = await asyncio.gather(batcher.submit(1), batcher.submit(2), return_exceptions=True)
    assert all(isinstance(error, ConnectionError) for error in failed)
    assert await batcher.submit(3) == 3


async def test_a_cancelled_caller_does_not_disturb_the_batch() -> None:
    """Whoever leaves early leaves the others' answers in order."""
    send = Recorder()
    send.gate.clear()
    batcher = Batcher(send, lambda _: 1)
    calls = [batcher.submit(n) for n in (1, 2, 3)]
    await asyncio.sleep(0)
    calls[1].cancel()
    send.gate.set()
    assert [await calls[0], await calls[2]] == [2, 6]
    with pytest.raises(asyncio.CancelledError):
        await calls[1]


async def test_close_cancels_those_who_still_wait() -> None:
    """Nobody awaits a closed batcher for ever."""
    send = Recorder()
    send.gate.clear()
    batcher = Batcher(send, lambda _: 1)
    calls = [batcher.submit(n) for n in (1, 2)]
    async with asyncio.timeout(5):
        await send.sending.wait()
        waiting = batcher.submit(3)
        await asyncio.sleep(0)
        await batcher.close()
        answers = await asyncio.gather(*calls, waiting, return_exceptions=True)
    assert all(isinstance(answer, asyncio.CancelledError) for answer in answers)


async def test_it_works_again_after_a_close_that_came_before_its_first_step() -> None:
    """What was submitted in the same turn is cancelled, what comes later is sent."""
    batcher = Batcher(Recorder(), lambda _: 1)
    early = batcher.submit(1)
    await batcher.close()
    assert early.cancelled()
    async with asyncio.timeout(5):
        assert await batcher.submit(2) == 4
