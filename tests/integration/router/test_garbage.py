"""What requests leave behind: nothing that only the garbage collector would find, with their bodies, much later."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from pathlib import Path

import pytest

from tests.integration.worker.fleet import local_fleet_on
from tests.integration.worker.test_attached_engines import attached, whole
from tests.integration.worker.test_slow_links import streams
from tests.support.garbage import without_collection
from tests.support.servers import Server

from .harness import running_router

ROUNDS, AT_ONCE = 50, 4
OURS = ("router.", "worker.", "queue_schemas.", "broker.", "telemetry.http.connections.")


def garbage_of_ours() -> Counter[str]:
    """Our own objects that are garbage now, by type."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        names = (f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.garbage)
        return Counter(name for name in names if name.startswith(OURS))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


@pytest.mark.parametrize("headers", [{}, {"Content-Encoding": "identity"}], ids=["without a task", "asgi"])
async def test_answered_requests_are_freed_at_once(valkey: Server, tmp_path: Path, headers: dict[str, str]) -> None:
    """Plain and streamed, by Router and worker: each holds a body that may be large."""

    async def answer(number: int, writer: asyncio.StreamWriter) -> None:
        if number % 2:
            writer.write(whole(b'{"a":1}'))
        else:
            await streams(writer, [b'data: {"n": %d}\n\n' % step for step in range(5)], 0.002)

    async with (
        local_fleet_on(valkey, tmp_path) as (fleet, client),
        attached(fleet, client, answer),
        running_router(valkey.url) as router,
    ):

        async def ask(number: int) -> None:
            fields = {"model": "open", "messages": [], "stream": bool(number % 2)}
            async with router.post(fields, headers=headers) as answered:
                assert answered.status == 200
                await answered.read()

        await asyncio.gather(*map(ask, range(AT_ONCE)))
        garbage_of_ours()
        with without_collection():
            for _ in range(ROUNDS):
                await asyncio.gather(*map(ask, range(AT_ONCE)))
            await asyncio.sleep(0.2)  # their last tasks end
            left = garbage_of_ours()
    # Half of the requests were plain, half streams: what each of either leaves comes up so often.
    assert {name: count for name, count in left.items() if count >= ROUNDS * AT_ONCE // 2} == {}
