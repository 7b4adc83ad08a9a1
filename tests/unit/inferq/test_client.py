"""The small client of the commands, against a server that answers as a Router does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from inferq.chat.client import Answer
from inferq.client import CREDENTIALS_ADVICE, RequestFailed
from inferq.doctor import DoctorTarget, examine
from queue_schemas import PoolDepth, PoolList
from tests.support.clients import RouterUser

HELLO = [{"role": "user", "content": "hello"}]
Serve = Callable[[Callable[[web.Request], Awaitable[web.StreamResponse]]], Awaitable[RouterUser]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts a server whose every path is the given handler; gives a client of it."""
    servers: list[TestServer] = []

    async def start(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> RouterUser:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        server = TestServer(app, host="127.0.0.1")
        await server.start_server()
        servers.append(server)
        return RouterUser(str(server.make_url("/")), api_key="key", join_token="token")

    yield start
    for server in servers:
        await server.close()


async def test_a_stream_is_read_piece_by_piece(serve: Serve) -> None:
    """Comments of a long wait are passed over; text, reason and usage are kept."""

    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.headers["authorization"] == "Bearer key"
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "x-request-id": "req_1"})
        await response.prepare(request)
        for line in (
            b": waiting\n\n",
            b'data: {"model": "m", "choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n',
            b'data: {"model": "m", "choices": [{"delta": {"content": "Pa"}}]}\n\n',
            b'data: {"model": "m", "choices": [{"delta": {"content": "ris"}, "finish_reason": "stop"}]}\n\n',
            b'data: {"model": "m", "choices": [], "usage": {"completion_tokens": 2}}\n\n',
            b"data: [DONE]\n\n",
        ):
            await response.write(line)
        return response

    answer = Answer()
    async with await serve(handler) as client:
        pieces = [piece async for piece in client.stream_chat(answer, "m", HELLO)]
    assert pieces == ["Pa", "ris"]
    assert (answer.text, answer.finish_reason, answer.request_id) == ("Paris", "stop", "req_1")
    assert answer.usage == {"completion_tokens": 2}


async def test_an_error_within_a_stream_is_raised(serve: Serve) -> None:
    """A stream that had begun can only end with an error event: it must not pass for an answer."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"error": {"message": "the stream broke", "code": "stream_broken"}}\n\n')
        return response

    async with await serve(handler) as client:
        with pytest.raises(RequestFailed, match="the stream broke"):
            [piece async for piece in client.stream_chat(Answer(), "m", HELLO)]


async def test_a_refusal_is_its_own_sentence(serve: Serve) -> None:
    """The error object's message, with its status."""

    async def handler(request: web.Request) -> web.StreamResponse:
        error = {"message": "no such model", "type": "t", "param": None, "code": "model_not_found"}
        return web.json_response({"error": error}, status=404)

    async with await serve(handler) as client:
        with pytest.raises(RequestFailed, match=r"no such model \(HTTP 404"):
            await client.chat("m", HELLO)
        with pytest.raises(RequestFailed, match="no such model"):
            await client.pools()


async def test_pools_are_read_with_the_join_token(serve: Serve) -> None:
    """The messages are those of the wire contract."""

    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.headers["x-inferq-join-token"] == "token"
        return web.Response(text=PoolList(pools=[PoolDepth(model="m", waiting=3)]).model_dump_json())

    async with await serve(handler) as client:
        assert [pool.waiting for pool in await client.pools()] == [3]


async def test_an_address_that_is_no_router_is_reported(serve: Serve) -> None:
    """Some other server on that port, or none."""

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(text="<html>")

    async with await serve(handler) as client:
        assert not await client.health()
        with pytest.raises(RequestFailed, match="not an inferq Router"):
            await client.workers()
    async with RouterUser("http://127.0.0.1:9") as nobody:
        with pytest.raises(RequestFailed, match=r"no Router answers at http://127\.0\.0\.1:9 \(connection refused\)"):
            await nobody.chat("m", HELLO)


@pytest.mark.parametrize(
    ("url", "wrong"),
    [
        ("127.0.0.1:18000", "does not begin with http:// or https://"),
        ("localhost:18000", "does not begin with http:// or https://"),
        ("http:/127.0.0.1", "does not begin with http:// or https://"),
        ("redis://127.0.0.1:6379", "does not begin with http:// or https://"),
        ("", "does not begin with http:// or https://"),
        ("http://", "names no host"),
        ("http://:18000", "names no host"),
        ("http://127.0.0.1:0", "has the port 0"),
        ("http://127.0.0.1:99999", "cannot be read"),
        ("http://127.0.0.1:port", "cannot be read"),
        ("http://[::1", "cannot be read"),
        ("http://127.0.0.1:18000?x=1", "goes on after its path"),
        ("http://127.0.0.1:18000/v1/", "ends with /v1"),
    ],
)
def test_what_is_wrong_with_a_url_is_reported(url: str, wrong: str) -> None:
    """Before anything is sent: one sentence with the URL, its fault and an example."""
    with pytest.raises(RequestFailed) as raised:
        RouterUser(url)
    assert repr(url) in raised.value.message
    assert wrong in raised.value.message
    assert "--router-url" in raised.value.message


@pytest.mark.parametrize("url", ["http://127.0.0.1:18000/", "https://router.example", "http://[::1]:1/inferq/"])
def test_a_good_url_loses_no_more_than_its_last_slash(url: str) -> None:
    """A path before ours (a gateway's) stays."""
    assert RouterUser(url).url == url.rstrip("/")


async def test_a_missing_key_is_asked_for_by_name(serve: Serve) -> None:
    """HTTP 401 says which options and variables to give, in the commands and in doctor."""

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == "/metrics":
            return web.Response(text="inferq_requests_total 1")
        return web.json_response({"error": {"message": "no valid key"}}, status=401)

    client = await serve(handler)
    async with client:
        for call in (client.models(), client.pools(), client.chat("m", HELLO)):
            with pytest.raises(RequestFailed, match=r"no valid key .*: give --api-key / --join-token \(INFERQ_API_KEY"):
                await call
    finding = (await examine(DoctorTarget("", client, Path())))[-1]
    assert (finding.check, finding.fix) == ("fabric", CREDENTIALS_ADVICE)
    assert "no valid key" in finding.text


@pytest.mark.parametrize("secret", ["two\nlines", "caf\u00e9", "\x00"])
@pytest.mark.parametrize("name", ["api_key", "join_token"])
def test_a_secret_that_no_header_can_carry_is_a_sentence(name: str, secret: str) -> None:
    """[H32] A key or token of several lines, or with letters beyond ASCII, is refused before it is sent, unshown."""
    with pytest.raises(RequestFailed, match="printable ASCII") as refused:
        RouterUser("http://127.0.0.1:1", **{name: secret})
    assert secret not in refused.value.message


async def test_a_newline_at_the_end_of_a_secret_is_not_sent(serve: Serve) -> None:
    """[H32] A key and a token read from files that end with a newline are what stands before it."""

    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.headers["authorization"] == "Bearer key"
        assert request.headers["x-inferq-join-token"] == "token"
        return web.json_response(PoolList(pools=[]).model_dump(mode="json"))

    url = (await serve(handler)).url
    async with RouterUser(url, api_key="key\n", join_token=" token\r\n") as client:
        assert await client.pools() == []
