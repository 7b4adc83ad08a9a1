"""What attempts are said to have used, by which tenants are charged."""

from __future__ import annotations

import pytest

from tests.unit.worker.attempts.scripted_engine import SSE, Answer, Bench, lease, plain

USAGE = b'"usage":{"prompt_tokens":700,"completion_tokens":5}'
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
FINISH = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'


def stream(*pieces: bytes) -> Answer:
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
