"""What attempts are said to have used, by which tenants are charged."""

from __future__ import annotations

import asyncio

import pytest

from queue_schemas import Outcome
from scheduling.cost import OUTPUT_WEIGHT
from tests.support.waiting import eventually
from tests.unit.worker.attempts.scripted_engine import SSE, Answer, Bench, lease, plain

USAGE = b'"usage":{"prompt_tokens":700,"completion_tokens":5}'
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
FINISH = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'


def stream(*pieces: bytes | asyncio.Event) -> Answer:
    return Answer(200, SSE, list(pieces))


@pytest.mark.parametrize(
    ("answer", "used"),
    [
        (plain(200, b"{%b}" % USAGE), 710),
        (plain(200, b"{}"), None),
        (plain(400, b'{"error":{}}'), 0),
        (stream(EVENT, FINISH, b"data: {%b}\n\n" % USAGE, b"data: [DONE]\n\n"), 710),
        (stream(EVENT, EVENT, FINISH + b"data: [DONE]\n\n"), 10 + 2 * 4),
        (plain(200, b'{"usage":{"prompt_tokens":-7,"completion_tokens":1000000000000000000}}'), None),
    ],
    ids=["plain", "no usage", "an error", "a stream with usage apart from its end", "a stream without", "absurd"],
)
async def test_an_answer_has_used_what_its_engine_says(answer: Answer, used: int | None) -> None:
    """Else what it said, if it was streamed; else nothing is known. What failed has used nothing."""
    bench = Bench(answer)
    await bench.run(lease(body=b"word" * 10, stream=answer.content_type == SSE))
    (figures,) = bench.broker.figures
    assert figures["used"] == used
    assert figures["run_ms"] is not None
    assert 0 <= figures["run_ms"] < 60_000


@pytest.mark.parametrize(("estimate", "used"), [(3, 2 * OUTPUT_WEIGHT), (500, None)])
async def test_a_stream_that_its_deadline_ends_has_used_what_it_said(estimate: int, used: int | None) -> None:
    """If that is more than its estimate: short deadlines make no long answers cheap."""
    bench = Bench(stream(EVENT, EVENT, asyncio.Event()))
    job_lease = lease(stream=True, cost_estimate=estimate)
    async with bench.running(job_lease):
        await eventually(lambda: (one := bench.attempts.running(job_lease.attempt_id)) and one.events == 2, "it speaks")
        bench.attempts.stop_late(asyncio.get_running_loop().time() + 1e6)
    ((_, outcome, _),) = bench.broker.settled
    assert outcome is Outcome.EXPIRED
    assert bench.broker.figures[0]["used"] == used
