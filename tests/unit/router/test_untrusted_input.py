"""What outsiders send to an inference path: passed on byte for byte, or refused with a 4xx and the error object."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from queue_schemas import Job
from router import RouterApp
from tests.unit.router.fakes import LIMIT_S, FakeQueue, router

CHAT = "/v1/chat/completions"
FORM = "multipart/form-data; boundary=B"
MAX_ERROR = 4_096
ASK = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'

any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
read_fields = st.sampled_from(["stream", "priority", "timeout", "stream_options", "seed", "temperature", "messages"])
odd_requests = st.dictionaries(read_fields, any_json | st.integers(1, 99), max_size=4).map(
    lambda odd: {"model": "m"} | odd
)
parts = st.tuples(
    st.sampled_from(
        [b'name="model"', b'name="stream"', b'name="timeout"', b'name="file"; filename="x"', b"", b"name=model"]
    ),
    st.sampled_from([b"m", b"true", b"30", b"nan", b"9" * 1_500]) | st.binary(max_size=12),
)
header_names = st.sampled_from(
    [b"x-request-id", b"content-type", b"traceparent", b"x-inferq-deadline-ms", b"x-inferq-on-loss", b"authorization",
     b"x-api-key", b"content-length"]
)  # fmt: skip
ODD_VALUES = [
    b"", b"0", b"-1", b"9" * 5_000, "²".encode("latin-1"), b"a\x01", b"application/json", b"multipart/form-data",
    b"multipart/form-data; boundary=" + b"x" * 100, b'multipart/form-data; boundary="',
]  # fmt: skip
headers = st.dictionaries(header_names, st.binary(max_size=30) | st.sampled_from(ODD_VALUES), max_size=3)


@st.composite
def forms(draw: st.DrawFn) -> bytes:
    """A form, as a rule broken in some places."""
    given_parts = [(b'name="model"', b"m"), *draw(st.lists(parts, max_size=4))]
    lines = b"".join(b"--B\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % part for part in given_parts)
    form = bytearray(lines + b"--B--\r\n")
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(form)))
        form[at : at + draw(st.integers(0, 6))] = draw(st.binary(max_size=4))
    return bytes(form)


bodies = (
    st.binary(max_size=60) | any_json.map(_json := lambda value: json.dumps(value).encode()) | odd_requests.map(_json)
)


async def send(
    app: RouterApp, queue: FakeQueue, body: bytes, sent: dict[bytes, bytes]
) -> tuple[Job | None, int, bytes]:
    """One request in two pieces, answered if it gets as far: its job, status and body of the answer."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": CHAT,
        "raw_path": CHAT.encode(), "query_string": b"", "root_path": "", "scheme": "http",
        "headers": list(sent.items()), "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
    }  # fmt: skip
    pieces = [body[:3], body[3:]]
    answered: list[Any] = []
    job: Job | None = None

    async def receive() -> Any:
        nonlocal job
        if pieces:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
        job = await queue.enqueued.get()
        queue.answer(job, b'{"ok":1}')
        return await asyncio.Event().wait()

    async def keep(message: Any) -> None:
        answered.append(message)

    async with asyncio.timeout(LIMIT_S):
        await app(scope, receive, keep)  # type: ignore[arg-type]
    return job, answered[0]["status"], b"".join(message.get("body", b"") for message in answered[1:])


def check(body: bytes, job: Job | None, status: int, answer: bytes) -> None:
    """It is one of the two things that may become of a request."""
    if job is not None:
        assert (status, answer) == (200, b'{"ok":1}')
        assert job.body == body
        assert Job.unpack(job.pack()) == job, "what was taken cannot be read by a worker"
        return
    error = json.loads(answer)["error"]
    assert 400 <= status < 500, error
    assert error.keys() == {"message", "type", "param", "code"}
    assert len(answer) < MAX_ERROR


def test_any_request_is_forwarded_unchanged_or_refused() -> None:
    """Odd JSON, broken forms and garbage in headers, in any combination."""

    async def live() -> None:
        queue = FakeQueue("m")
        async with router(queue, directory_interval_ms=60_000) as app:
            loop = asyncio.get_running_loop()
            taken = 0

            @settings(max_examples=700, derandomize=True, database=None)
            @given(bodies | forms(), headers)
            def ask(body: bytes, odd: dict[bytes, bytes]) -> None:
                nonlocal taken
                sent = ({b"content-type": FORM.encode()} if body.startswith(b"--B") else {}) | odd
                job, status, answer = asyncio.run_coroutine_threadsafe(send(app, queue, body, sent), loop).result(20)
                taken += job is not None
                check(body, job, status, answer)

            await asyncio.to_thread(ask)
            assert taken > 25, "hardly anything was let through: the test shows little"
            assert (len(app.services.requests), app.services.requests.body_bytes) == (0, 0)

    asyncio.run(live())


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 1_000_000, 400),
        (b'{"a":' * 200_000, 400),
        (ASK[:-1] + b',"x":' + b"[" * 900 + b"]" * 900 + b"}", 200),
        (b'{"model":"m","model":"m"}', 200),
        (b'{"model":"m","priority":1e400}', 400),
        (b'{"model":"m","priority":' + b"9" * 5_000 + b"}", 400),
        (b'{"model":"m","timeout":1e999}', 400),
        (b'{"model":"m","x":NaN}', 400),
        (b'{"model":"\\ud800"}', 400),
        (b'{"model":"m\\u0000"}', 400),
        (b'{"model":"m\\u001b[2J"}', 400),
        (b'{"model":"m","x":"\xff"}', 400),
        (b'{"model":"m","\xed\xa0\x80":1}', 400),
        (b"\xef\xbb\xbf" + ASK, 400),
        (ASK.decode().encode("utf-16"), 400),
        (ASK.decode().encode("utf-32-le"), 400),
        (b"\0" * 100_000, 400),
    ],
)
async def test_shapes_that_break_parsers_are_refused_or_forwarded(body: bytes, status: int) -> None:
    """Nesting, huge numbers, doubled names, other encodings: no more memory than some times the body, and no crash."""
    queue = FakeQueue("m")
    async with router(queue, directory_interval_ms=60_000) as app:
        tracemalloc.start()
        try:
            job, answered, answer = await send(app, queue, body, {b"content-type": b"application/json"})
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert answered == status
    check(body, job, answered, answer)
    assert peak < 2_000_000 + 16 * len(body)
