"""Errors as the unmodified SDKs read them: in the shape of each API, before a stream and within one."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anthropic
import httpx
import httpx2
import openai
import orjson
import pytest

from queue_schemas import BrokerFull, MarkerKind, OverCapacity
from tests.support.event_streams import single_bytes
from tests.support.waiting import eventually
from tests.unit.router.fakes import FakeQueue, PersistedStream
from tests.unit.router.served import Served, served

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
MESSAGE = {"model": "m", "max_tokens": 9, "messages": MESSAGES}
START = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant",'
    b'"content":[],"model":"m","stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":1,"output_tokens":0}}}\n\n'
    b'event: content_block_start\ndata: {"type":"content_block_start","index":0,"content_block":{"type":"text",'
    b'"text":""}}\n\n'
)
HELLO = (
    b"event: content_block_delta\n"
    b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hello"}}\n\n'
)
STOP = (
    b'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n'
    b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},'
    b'"usage":{"output_tokens":1}}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)
OLD_SHAPE = (
    b'{"object":"error","message":"the prompt is too long","type":"BadRequestError","param":"messages","code":400}'
)
REFUSALS = {
    "vLLM's older shape": (OLD_SHAPE, "the prompt is too long"),
    "FastAPI": (b'{"detail":"the prompt is too long"}', "the prompt is too long"),
    "FastAPI's list": (
        b'{"detail":[{"loc":["body","messages"],"msg":"the prompt is too long","type":"x"}]}',
        "messages: the prompt is too long",
    ),
    "text": (b"the prompt is too long\n", "the prompt is too long"),
    "HTML": (b"<html><head><title>400 Bad Request</title></head><body>nginx</body></html>", "400 Bad Request"),
    "nothing": (b"", "the engine answered with status 400 and an empty body"),
    "OpenAI's shape": (b'{"error":{"message":"the prompt is too long","type":"t","param":null,"code":1}}',
                       "the prompt is too long"),
    "Anthropic's shape": (
        b'{"type":"error","error":{"type":"invalid_request_error","message":"the prompt is too long"}}',
        "the prompt is too long",
    ),
}  # fmt: skip


async def _read(stream: Any) -> list[Any]:
    return [event async for event in stream]


async def _openai_stream(of: Served) -> list[Any]:
    async with of.openai() as client:
        return await _read(await client.chat.completions.create(model="m", messages=MESSAGES, stream=True))


async def _openai_sync_stream(of: Served) -> list[Any]:
    def run() -> list[Any]:
        with of.openai_sync() as client:
            return list(client.chat.completions.create(model="m", messages=MESSAGES, stream=True))

    return await asyncio.to_thread(run)


async def _completions_stream(of: Served) -> list[Any]:
    async with of.openai() as client:
        return await _read(await client.completions.create(model="m", prompt="hi", stream=True))


async def _responses_stream(of: Served) -> list[Any]:
    async with of.openai() as client:
        return await _read(await client.responses.create(model="m", input="hi", stream=True))


async def _anthropic_stream(of: Served) -> list[Any]:
    async with of.anthropic() as client:
        return await _read(await client.messages.create(model="m", max_tokens=9, messages=MESSAGES, stream=True))


async def _anthropic_helper(of: Served) -> list[Any]:
    async with of.anthropic() as client, client.messages.stream(**MESSAGE) as stream:  # type: ignore[arg-type]
        return [await stream.get_final_text()]


async def _anthropic_sync_helper(of: Served) -> list[Any]:
    def run() -> list[Any]:
        with of.anthropic_sync() as client, client.messages.stream(**MESSAGE) as stream:  # type: ignore[arg-type]
            return [stream.get_final_text()]

    return await asyncio.to_thread(run)


OPENAI = [_openai_stream, _openai_sync_stream, _completions_stream, _responses_stream]
ANTHROPIC = [_anthropic_stream, _anthropic_helper, _anthropic_sync_helper]
Read = Callable[[Served], Awaitable[list[Any]]]


def _refusals(reads: list[Any]) -> list[tuple[Any, str]]:
    """Every kind by one way of reading, and one kind by every other way."""
    return [(reads[0], kind) for kind in REFUSALS] + [(read, "vLLM's older shape") for read in reads[1:]]


@pytest.fixture
async def queue() -> FakeQueue:
    return FakeQueue("m")


@pytest.fixture
async def quiet(queue: FakeQueue) -> AsyncIterator[Served]:
    """A Router whose streams show signs of life at once."""
    async with served(queue, keepalive_interval_ms=50) as running:
        yield running


async def _once_alive(of: Served) -> None:
    """Until each open stream was sent a sign of life."""
    requests = of.app.services.requests
    await eventually(lambda: all(one.last_sent_s > one.started_s for one in requests.now_open()), "a sign of life")


@pytest.mark.parametrize("read", ANTHROPIC)
@pytest.mark.parametrize("after_start", [False, True])
async def test_a_message_stream_that_breaks_is_an_error(
    quiet: Served, queue: FakeQueue, read: Read, after_start: bool
) -> None:
    """[C2] Midway, or before its first event but after signs of life: the SDK raises its status error, with the type,
    instead of ending with half a text or an assertion."""
    asking = asyncio.ensure_future(read(quiet))
    job = await queue.job()
    if after_start:
        queue.stream(job, START, HELLO, end=False)
    await _once_alive(quiet)
    queue.mark(job, MarkerKind.EXPIRED, reason="its time ran out")
    with pytest.raises(anthropic.APIStatusError, match="its time ran out") as raised:
        await asking
    assert raised.value.type == "timeout_error"
    assert raised.value.body["request_id"] == raised.value.request_id  # type: ignore[index]


@pytest.mark.parametrize("read", ANTHROPIC)
async def test_a_message_stream_with_pings_is_whole(quiet: Served, queue: FakeQueue, read: Read) -> None:
    """[C2] Pings, before the stream and within it, are no part of the message."""
    asking = asyncio.ensure_future(read(quiet))
    job = await queue.job()
    await _once_alive(quiet)
    queue.stream(job, START, HELLO, end=False)
    await _once_alive(quiet)
    queue.stream(job, STOP, first=2)
    events = await asking
    assert events == ["Hello"] or [event.type for event in events][-1] == "message_stop"


async def _refused(
    quiet: Served, queue: FakeQueue, read: Read, kind: str, *, alive: bool
) -> tuple[asyncio.Future[Any], str]:
    """A request that its engine refuses, after signs of life if ``alive``, and what the engine says."""
    body, message = REFUSALS[kind]
    asking = asyncio.ensure_future(read(quiet))
    job = await queue.job()
    if alive:
        await _once_alive(quiet)
    queue.answer(job, body, status=400)
    return asking, message


@pytest.mark.parametrize(("read", "kind"), _refusals(ANTHROPIC))
@pytest.mark.parametrize("alive", [False, True])
async def test_an_engines_refusal_of_a_message_has_the_messages_shape(
    quiet: Served, queue: FakeQueue, read: Read, kind: str, alive: bool
) -> None:
    """[C2] Whatever shape the engine's refusal has, before the stream or after keep-alive comments."""
    asking, message = await _refused(quiet, queue, read, kind, alive=alive)
    with pytest.raises(anthropic.APIStatusError) as raised:
        await asking
    assert (raised.value.type, raised.value.api_message) == ("invalid_request_error", message)
    assert raised.value.status_code in ((400,) if not alive else (200, 400))


@pytest.mark.parametrize(("read", "kind"), _refusals(OPENAI))
@pytest.mark.parametrize("alive", [False, True])
async def test_an_engines_refusal_raises_with_its_message(
    quiet: Served, queue: FakeQueue, read: Read, kind: str, alive: bool
) -> None:
    """[C4] After keep-alive comments began a stream, and before: the SDK raises, and shows the engine's message."""
    asking, message = await _refused(quiet, queue, read, kind, alive=alive)
    with pytest.raises(openai.APIError) as raised:
        await asking
    assert message in raised.value.message
    assert isinstance(raised.value.body, dict)
    assert raised.value.body["message"] == message


@pytest.mark.parametrize("read", [_openai_stream, _anthropic_stream])
@pytest.mark.parametrize("alive", [False, True])
@pytest.mark.parametrize("kind", ["text/event-stream", "text/html; charset=utf-8", "application/octet-stream", ""])
async def test_a_refusals_content_type_makes_no_difference(
    quiet: Served, queue: FakeQueue, read: Read, alive: bool, kind: str
) -> None:
    """[C4] An engine that labels its refusal wrongly, as a stream even, is understood all the same."""
    asking = asyncio.ensure_future(read(quiet))
    job = await queue.job()
    if alive:
        await _once_alive(quiet)
    queue.answer(job, OLD_SHAPE, status=400, kind=kind)
    with pytest.raises((openai.APIError, anthropic.APIStatusError), match="the prompt is too long"):
        await asking


@pytest.mark.parametrize("read", OPENAI)
async def test_a_stream_of_the_openai_api_that_breaks_is_an_error(quiet: Served, queue: FakeQueue, read: Read) -> None:
    """[C2] Chats, completions and responses raise, with message and code."""
    asking = asyncio.ensure_future(read(quiet))
    job = await queue.job()
    queue.stream(job, b'event: x\ndata: {"type": "x", "choices": [], "sequence_number": 6}\n\n', end=False)
    await _once_alive(quiet)
    queue.mark(job, MarkerKind.CANCELLED, reason="somebody said so")
    with pytest.raises(openai.APIError, match="somebody said so") as raised:
        await asking
    assert raised.value.code == "cancelled"


async def test_the_error_event_of_a_responses_stream_continues_its_numbers(quiet: Served, queue: FakeQueue) -> None:
    """[C2] Its error event is the one that the API documents, with the number behind the last."""
    async with httpx.AsyncClient() as client:
        asking = asyncio.ensure_future(
            client.post(f"{quiet.url}/v1/responses", json={"model": "m", "input": "hi", "stream": True})
        )
        job = await queue.job()
        queue.stream(job, b'event: x\ndata: {"type": "x", "sequence_number": 41}\n\n', end=False)
        await _once_alive(quiet)
        queue.mark(job, MarkerKind.CANCELLED, reason="no")
        body = (await asking).content
    name, data = body.removesuffix(b"\n\n").rsplit(b"\n\n", 1)[-1].rsplit(b"event: ", 1)[-1].split(b"\ndata: ")
    told = orjson.loads(data)
    assert (name, told["type"], told["sequence_number"], told["code"]) == (b"error", "error", 42, "cancelled")
    assert told["message"] == told["error"]["message"]


_KEY = {"api_keys": f"{hashlib.sha256(b'key').hexdigest()}:acme"}


@pytest.mark.parametrize(
    ("fault", "settings", "error", "kind"),
    [
        ({"model": "nobody"}, {}, anthropic.NotFoundError, "not_found_error"),
        ({"model": 3}, {}, anthropic.BadRequestError, "invalid_request_error"),
        ({"extra_body": {"model": "m", "stream": "yes"}}, {}, anthropic.BadRequestError, "invalid_request_error"),
        ({"extra_headers": {"x-inferq-deadline-ms": "soon"}}, {}, anthropic.BadRequestError, "invalid_request_error"),
        ({}, _KEY, anthropic.AuthenticationError, "authentication_error"),
        ({"extra_body": {"x": "y" * 3_000}}, {"max_body_bytes": 1024}, anthropic.ContentTooLargeError,
         "request_too_large"),
        ({}, {"max_concurrent_requests": 1}, anthropic.RateLimitError, "rate_limit_error"),
        ({"extra_headers": {"x-inferq-deadline-ms": "50"}}, {"deadline_grace_ms": 0}, anthropic.GatewayTimeoutError,
         "timeout_error"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refused_message_raises_the_sdks_own_error(
    queue: FakeQueue, fault: dict[str, Any], settings: dict[str, Any], error: type[Exception], kind: str, stream: bool
) -> None:
    """[C2] Before a stream begins: 400, 401, 404, 413, 429 and 504 are the SDK's typed errors, with the API's type."""
    async with served(queue, **settings) as running, running.anthropic(api_key="another") as client:
        held = None
        if "max_concurrent_requests" in settings:
            held = asyncio.ensure_future(_anthropic_stream(running))
            await queue.job()
        with pytest.raises(error) as raised:
            await client.messages.create(**(MESSAGE | {"stream": stream} | fault))
        if held is not None:
            held.cancel()
            await asyncio.gather(held, return_exceptions=True)
    refused = raised.value
    assert isinstance(refused, anthropic.APIStatusError)
    assert (refused.type, bool(refused.api_message)) == (kind, True)
    assert refused.body["type"] == "error"  # type: ignore[index]
    assert refused.request_id and refused.body["request_id"] == refused.request_id  # type: ignore[index]


@pytest.mark.parametrize(
    ("refusal", "error", "kind"),
    [
        (OverCapacity("too much", retry_after_s=7), anthropic.RateLimitError, "rate_limit_error"),
        (BrokerFull("full"), anthropic.ServiceUnavailableError, "overloaded_error"),
    ],
)
async def test_a_full_or_missing_queue_is_an_error_of_the_messages_api(
    queue: FakeQueue, refusal: Any, error: type[Exception], kind: str
) -> None:
    """[C2] 429 and 503, with ``Retry-After``."""
    queue.refusal = refusal
    async with served(queue) as running, running.anthropic() as client:
        with pytest.raises(error) as raised:
            await client.messages.create(**MESSAGE)  # type: ignore[call-overload]
    assert raised.value.type == kind  # type: ignore[attr-defined]
    assert raised.value.response.headers["retry-after"] in ("7", "1")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "kind"),
    [
        ("GET", "/v1/messages", b"", 405, "invalid_request_error"),
        ("POST", "/v1/messages/batches", b"{}", 404, "not_found_error"),
        ("PUT", "/v1/messages/x/y", b"", 404, "not_found_error"),
        ("POST", "/v1/messages", b'{"model": ', 400, "invalid_request_error"),
        ("POST", "/v1/%6dessages", b"{}", 404, "not_found_error"),
    ],
)
async def test_every_path_below_messages_uses_its_dialect(
    queue: FakeQueue, method: str, path: str, body: bytes, status: int, kind: str
) -> None:
    """[C2] A wrong method, an unknown path, a body that is not JSON: the error has the API's shape."""
    async with served(queue) as running, httpx.AsyncClient() as client:
        answer = await client.request(method, running.url + path, content=body)
    assert (answer.status_code, answer.json()["type"], answer.json()["error"]["type"]) == (status, "error", kind)
    assert answer.headers["request-id"] == answer.json()["request_id"]


async def test_other_paths_use_openais_dialect(queue: FakeQueue) -> None:
    """[C2] Also a path that only begins like one of them."""
    async with served(queue) as running, httpx.AsyncClient() as client:
        for path in ("/v1/messagesx", "/v1/rerank", "/v1/nothing", "/nothing"):
            answer = await client.get(running.url + path)
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("read", [_openai_stream, _openai_sync_stream])
async def test_a_resumable_stream_with_keepalives_is_whole(queue: FakeQueue, read: Read) -> None:
    """[C1] Events with ids, a silent engine, an engine's own comments: openai for Python reads the text to its end."""
    chunk = b'data: {"id":"1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
    async with served(queue, keepalive_interval_ms=50, resumable_streams=True) as running:
        asking = asyncio.ensure_future(read(running))
        stream = PersistedStream(queue, await queue.job())
        await _once_alive(running)
        stream.say(chunk, b": the engine says hello\n\n", b"retry: 100\n\n")
        await _once_alive(running)
        stream.say(chunk, b"data: [DONE]\n\n", end=True)
        chunks = await asking
    assert [piece.choices[0].delta.content for piece in chunks] == ["a", "a"]


async def test_a_keepalive_is_sent_when_it_is_due(queue: FakeQueue) -> None:
    """[C1] Not with the next event: it keeps proxies from closing the connection."""
    async with served(queue, keepalive_interval_ms=50, resumable_streams=True) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(running.url.rpartition(":")[2]))
        body = orjson.dumps({"model": "m", "messages": MESSAGES, "stream": True})
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: %d\r\n\r\n" % len(body)
        writer.write(head + body)
        PersistedStream(queue, await queue.job())
        async with asyncio.timeout(5):
            await reader.readuntil(b": queued\n")
            await reader.readuntil(b": queued\n")
        writer.close()


@pytest.mark.parametrize("api", ["openai", "anthropic"])
async def test_a_stream_that_is_cut_anywhere_is_an_error_or_whole(api: str) -> None:
    """[C2] The Router dies after any byte of a small stream: the SDK raises, or it had all of it."""
    chunk = b'data: {"id":"1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
    stream = chunk + b"data: [DONE]\n\n" if api == "openai" else HELLO + STOP
    encoded = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in single_bytes(stream)) + b"0\r\n\r\n"
    end = stream.index(b"[DONE]") + len(b"[DONE]\n") if api == "openai" else len(stream)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    cut_at = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(request.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
        writer.write(head + encoded[:cut_at])
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        of = Served(None, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")  # type: ignore[arg-type]
        for cut_at in range(0, len(encoded), 61):
            whole = cut_at // 6 >= end
            try:
                await (_openai_stream(of) if api == "openai" else _anthropic_stream(of))
            except (openai.APIError, anthropic.APIError, httpx2.HTTPError):  # some pass the SDKs as they are
                assert not whole
            else:
                assert whole, f"cut after byte {cut_at // 6} of {len(stream)} and not noticed"
