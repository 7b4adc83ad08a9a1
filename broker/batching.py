"""``Batcher`` sends concurrent calls of one kind in one round trip and returns each caller its own answer.

No timer delays anything: a batch is what has gathered while the previous one was on its way, so a lone call goes out
at once and a thousand concurrent ones share a few. What fills a batch does not wait for the previous one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")

MAX_BATCH_ITEMS = 128
MAX_BATCH_BYTES = 1 << 20


class Batcher(Generic[Item, Answer]):
    """Collects items and sends them with ``send``, which answers one result per item, in order.

    ``size`` gives an item's bytes: a batch ends before it passes ``max_bytes`` (one large item goes alone). An
    error of ``send`` reaches every caller of that batch. An answer may be an exception: it is raised for that item.
    While more than a batch waits, up to ``max_flights`` are on their way, so that neither side waits for the other.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Item]], Awaitable[Sequence[Answer | Exception]]],
        size: Callable[[Item], int],
        *,
        max_bytes: int = MAX_BATCH_BYTES,
        max_flights: int = 2,
    ) -> None:
        self._send = send
        self._size = size
        self._max_bytes = max_bytes
        self._waiting: deque[tuple[Item, asyncio.Future[Answer]]] = deque()
        self._max_flights = max_flights
        self._flights = 0
        self._senders: set[asyncio.Task[None]] = set()

    def submit(self, item: Item) -> asyncio.Future[Answer]:
        """Send ``item`` with the next batch: its answer, or the error. Cancelling it stops nothing."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if not self._flights or (self._flights < self._max_flights and len(self._waiting) >= MAX_BATCH_ITEMS):
            self._flights += 1
            sender = asyncio.create_task(self._drain())
            self._senders.add(sender)
            sender.add_done_callback(self._senders.discard)
        return future

    async def _drain(self) -> None:
        try:
            while self._waiting and (self._flights == 1 or len(self._waiting) >= MAX_BATCH_ITEMS):
                batch = self._next_batch()
                try:
                    answers = await self._send([item for item, _ in batch])
                except asyncio.CancelledError:
                    self._waiting.extendleft(reversed(batch))
                    raise
                except Exception as error:  # noqa: BLE001 - it is not ours to judge: each caller gets it
                    answers = [error] * len(batch)
                for (_, future), answer in zip(batch, answers, strict=True):
                    if future.done():
                        continue
                    if isinstance(answer, Exception):
                        future.set_exception(answer)
                    else:
                        future.set_result(answer)
        finally:
            self._flights -= 1

    def _next_batch(self) -> list[tuple[Item, asyncio.Future[Answer]]]:
        batch = [self._waiting.popleft()]
        size = self._size(batch[0][0])
        while self._waiting and len(batch) < MAX_BATCH_ITEMS:
            size += self._size(self._waiting[0][0])
            if size > self._max_bytes:
                break
            batch.append(self._waiting.popleft())
        return batch

    async def close(self) -> None:
        """Stop; callers that still wait are cancelled."""
        for sender in self._senders:
            sender.cancel()
        await asyncio.gather(*self._senders, return_exceptions=True)
        self._flights = 0  # one that was cancelled before its first step did not count itself off
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()
