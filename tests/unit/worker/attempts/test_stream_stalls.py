"""Streams that an engine forgot while it served others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from queue_schemas import (
    END,
    Lease,
    Outcome,
)
from tests.support.waiting import eventually
from tests.unit.worker.attempts.scripted_engine import SSE, Answer, Bench, lease, plain
from worker.attempts import StreamTimeouts

LIMITS = StreamTimeouts(text_s=120.0, buffered_s=1_800.0)


CHATTING = {"model": "m", "messages": [], "stream": True}


@asynccontextmanager
async def silent_beside_another(
    bench: Bench, job_lease: Lease, pieces: int = 2
) -> AsyncIterator[Callable[[float, float], None]]:
    """The stream of ``job_lease`` has said ``pieces`` and no more; gives a way to let time pass beside a busy one."""
    leave = asyncio.Event()
    bench.engine.answer = Answer(200, SSE, [*[b"data: 1\n\n"] * pieces, leave])

    def pass_time(begin: float, end: float) -> None:
        for second in range(int(begin), int(end)):
            bench.attempts._relay.output_count += 1
            bench.attempts.stop_stalled(float(second), LIMITS)

    def waits_for_more() -> bool:
        attempt = bench.attempts.running(job_lease.attempt_id)
        return attempt is not None and attempt.stall.pieces == pieces and attempt.stall.reading

    async with bench.running(job_lease):
        await eventually(waits_for_more, "it has begun, and all that it said has left")
        try:
            yield pass_time
        finally:
            leave.set()


@pytest.mark.parametrize(
    "asked",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_schema"}},
        {"reasoning_effort": "high"},
    ],
)
async def test_a_stream_that_engines_buffer_is_asked_once(asked: dict[str, Any]) -> None:
    """[C5] With tools, a format or reasoning an engine may say nothing for minutes while its other streams go on."""
    bench = Bench(plain(200))
    job_lease = lease(stream=True, body=json.dumps(CHATTING | asked).encode())
    async with silent_beside_another(bench, job_lease) as pass_time:
        pass_time(0, 1_700)
        await asyncio.sleep(0)
        assert len(bench.attempts) == 1
    assert len(bench.engine.calls) == 1
    assert bench.engine.left_early == 0


async def test_a_forgotten_stream_fails_where_there_is_no_other_engine() -> None:
    """[C5] The same engine would do the same again: the client is told at once, and which limit it was."""
    for asked, pieces, seconds, setting in (
        ({}, 2, 122, "STREAM_IDLE_TIMEOUT_MS"),
        ({}, 1, 1_802, "BUFFERED_STREAM_TIMEOUT_MS"),
        ({"tools": [{}]}, 2, 1_802, "BUFFERED_STREAM_TIMEOUT_MS"),
    ):
        bench = Bench(plain(200))
        bench.elsewhere = False
        async with silent_beside_another(
            bench, lease(stream=True, body=json.dumps(CHATTING | asked).encode()), pieces
        ) as pass_time:
            pass_time(0, seconds)
            await asyncio.wait_for(bench.attempts.idle(), 10)
        ((_, outcome, frames),) = bench.broker.settled
        assert outcome is Outcome.FAILED
        assert setting.encode() in frames[-1].data
        assert frames[-1].flags & END


@pytest.mark.parametrize(("attempt", "released"), [(1, 1), (2, 0)])
async def test_a_forgotten_stream_is_tried_elsewhere_once(attempt: int, released: int) -> None:
    """[C5] Another engine may do better; one that forgets it as well is the last."""
    bench = Bench(plain(200))
    job_lease = lease(attempt, stream=True, body=json.dumps(CHATTING).encode())
    async with silent_beside_another(bench, job_lease) as pass_time:
        pass_time(0, 122)
        await asyncio.wait_for(bench.attempts.idle(), 10)
    assert (len(bench.broker.released), len(bench.broker.settled)) == (released, 1 - released)
