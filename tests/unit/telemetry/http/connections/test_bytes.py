"""What a client sends: heads, bodies, their framing, pipelined requests, over raw sockets."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace

import pytest
import uvloop
from starlette.types import Message, Receive, Scope, Send

from telemetry.http.connections import ConnectionLimits
from tests.support.sockets import RawClient
from tests.support.waiting import eventually
from tests.unit.telemetry.http.connections.serving import EchoApp, chunked, post, serving

LIMITS = ConnectionLimits(linger_bytes=1 << 20, linger_s=0.4)
SECOND = b"GET /second HTTP/1.1\r\nHost: test\r\n\r\n"


@pytest.mark.parametrize("path", ["/ignore", "/echo"])
@pytest.mark.parametrize(
    ("beginning", "endless"),
    [
        (b"0\r\n", b"x-trailer: " + b"y" * 1000 + b"\r\n"),
        (b"0\r\nx-trailer: ", b"y" * 1000),
        (b"1;ext=", b"y" * 1000),
        (b"", b"1;ext=" + b"y" * 1000 + b"\r\nz\r\n"),
        (b"", b"0" * 1000),
        (b"", b"000000000000001\r\nz\r\n" * 50),
    ],
    ids=["trailer lines", "one trailer", "one extension", "extensions", "zeros", "small chunks"],
)
async def test_what_frames_a_body_is_bounded(path: str, beginning: bytes, endless: bytes) -> None:
    """[B1] Endless trailers, chunk extensions and chunk sizes are cut, whether the request was refused or is read."""
    async with serving(EchoApp(), LIMITS) as port, RawClient.to(port) as client:
        await client.send(chunked(path) + beginning)
        if path == "/ignore":
            assert (await client.answer()).status == 401
        sent = await client.send_for_ever(endless * 8, 64 << 20)
        assert sent < 32 << 20  # what the kernel's buffers hold, too


@pytest.mark.parametrize("head", [chunked("/ignore"), post("/ignore", b"")[:-4] + b"\r\nX: y\r\n\r\n"])
async def test_a_refused_request_ends_soon_however_much_it_sends(head: bytes) -> None:
    """[B1] After a refusal so many bytes are read, and no more; a client that reads sees the refusal."""
    head = head.replace(b"Content-Length: 0", b"Content-Length: 99999999999")
    async with serving(EchoApp(), LIMITS) as port, RawClient.to(port) as client:
        await client.send(head)
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (401, "close")
        assert await client.send_for_ever(b"10000\r\n" + b"x" * 0x10000 + b"\r\n", 64 << 20) < 32 << 20


async def test_a_refused_request_that_trickles_ends_soon() -> None:
    """[B1] After a refusal the rest of a body is not waited for."""
    async with serving(EchoApp(), LIMITS) as port, RawClient.to(port) as client:
        await client.send(chunked("/ignore"))
        assert (await client.answer()).status == 401
        assert await client.ended() == b""
        assert await client.send_for_ever(b"1\r\nx\r\n", 10_000, pause_s=0.05) < 200


async def test_a_small_rest_of_a_refused_request_keeps_the_connection() -> None:
    """A body that was on its way when the answer went out is read and forgotten, and the next request is served."""
    async with serving(EchoApp(), LIMITS) as port, RawClient.to(port) as client:
        request = post("/ignore", b"x" * 100)
        for _ in range(2):
            await client.send(request[:-100])
            assert (await client.answer()).status == 401
            await client.send(request[-100:])
        await client.send(post("/echo", b"hello"))
        assert (await client.answer()).body == b"hello"


async def test_trailers_are_not_headers() -> None:
    """[B1] What comes behind the body does not become a header of its request."""
    app = EchoApp()
    async with serving(app) as port, RawClient.to(port) as client:
        await client.send(chunked("/echo") + b"2\r\nhi\r\n0\r\nAuthorization: Bearer x\r\nHost: evil\r\n\r\n")
        assert (await client.answer()).body == b"hi"
    assert app.headers == [{b"host": b"test", b"transfer-encoding": b"chunked"}]


UPGRADES = [
    ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"),
    ("Connection: upgrade", "Upgrade: h2c"),
    ("Upgrade: websocket", "Connection: keep-alive, Upgrade", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="),
    ("Connection: Upgrade", "Upgrade: TLS/1.0, foo/2"),
]


@pytest.mark.parametrize("offer", UPGRADES, ids=lambda offer: offer[-1])
@pytest.mark.parametrize("split", ["whole", "body later", "byte by byte"])
@pytest.mark.parametrize("coding", ["length", "chunked"])
async def test_an_offer_to_upgrade_is_ignored(offer: tuple[str, ...], split: str, coding: str) -> None:
    """[B4] The body of a request with an Upgrade offer is its own, however it arrives, and the connection goes on."""
    app = EchoApp()
    body = b"POST /hidden HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n"
    request = post("/echo", body, *offer)
    if coding == "chunked":
        request = chunked("/echo", *offer) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    at = request.index(b"\r\n\r\n") + 4
    pieces = {"whole": [request], "body later": [request[:at], request[at:]]}.get(split)
    async with serving(app) as port, RawClient.to(port) as client:
        for _ in range(2):
            for piece in pieces or [request[i : i + 1] for i in range(len(request))]:
                await client.send(piece)
                await asyncio.sleep(0)
            answer = await client.answer()
            assert (answer.status, answer.body) == (200, body)
        await client.send(SECOND)
        assert (await client.answer()).status == 200
    assert app.seen == [("POST", "/echo", body)] * 2 + [("GET", "/second", b"")]


async def test_many_offers_to_upgrade_in_one_segment_cost_little() -> None:
    """[B4] A segment full of requests with offers is neither recursed into nor answered beyond the bound."""
    app = EchoApp()
    one = b"GET /a HTTP/1.1\r\nHost: test\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"
    async with serving(app) as port, RawClient.to(port) as client:
        await client.send(one * 3000)
        text = await client.ended()
    assert 1 <= text.count(b"HTTP/1.1 200") <= 64
    assert len(app.seen) <= 64


async def test_a_stream_over_http_1_0_is_raw_bytes() -> None:
    """[B5] No chunk sizes; the end of the connection is the end of the answer, also where keep-alive was asked for."""
    async with serving(EchoApp()) as port:
        for extra in ((), ("Connection: keep-alive",)):
            async with RawClient.to(port) as client:
                await client.send(post("/stream", b"", *extra, version="1.0"))
                text = await client.ended()
            head, _, body = text.partition(b"\r\n\r\n")
            assert body == b"onetwothree"
            assert b"transfer-encoding" not in head.lower()
            assert b"connection: close" in head.lower()


async def test_a_stream_that_breaks_over_http_1_0_is_reset() -> None:
    """[B5] Half an answer does not look like a whole one."""
    async with serving(EchoApp()) as port, RawClient.to(port) as client:
        await client.send(post("/broken", b"", version="1.0"))
        with pytest.raises(ConnectionResetError):
            async with asyncio.timeout(5):
                await client.reader.read()


@pytest.mark.parametrize("behind", [SECOND, SECOND[:9], post("/echo", b"x" * 300_000), SECOND * 40], ids=len)
async def test_closing_behind_a_pipelined_request_ends_the_first(behind: bytes) -> None:
    """[B6] A client that closes while a request waits, with more sent behind it, is noticed at once."""
    app = EchoApp()
    async with serving(app) as port:
        async with RawClient.to(port) as client:
            await client.send(post("/wait"))
            await eventually(lambda: app.open == 1, "it waits")
            await client.send(behind)
            client.writer.close()
            await eventually(lambda: app.gone == 1, "it was told that the client is gone")
        await eventually(lambda: not app.open, "nothing is left")
    assert app.seen == [("POST", "/wait", b"")]


async def test_a_client_that_only_ends_its_side_gets_what_takes_no_waiting() -> None:
    """[B6] Requests sent before the client shut down its side are answered; one that has to wait is given up."""
    app = EchoApp()
    async with serving(app) as port:
        async with RawClient.to(port) as client:
            client.writer.write(post("/echo", b"1") + post("/stream", b"") + post("/large"))
            client.writer.write_eof()
            assert [(await client.answer()).body[:11] for _ in range(3)] == [b"1", b"onetwothree", b"x" * 11]
            assert await client.ended() == b""
        async with RawClient.to(port) as client:
            client.writer.write(post("/wait"))
            client.writer.write_eof()
            assert await client.ended() == b""
            assert app.gone == 1


async def test_pipelined_requests_are_answered_in_order() -> None:
    """Several at once, some malformed: each answer is whole before the next begins, and nothing follows an error."""
    app = EchoApp()
    async with serving(app) as port, RawClient.to(port) as client:
        await client.send(post("/wait") + post("/stream", b"") + b"NONSENSE\r\n\r\n" + SECOND)
        await eventually(lambda: app.open == 1, "the first waits")
        app.go.set()
        assert [(await client.answer()).status for _ in range(3)] == [200, 200, 400]
        assert await client.ended() == b""
    assert [path for _, path, _ in app.seen] == ["/wait", "/stream"]


async def test_what_is_pipelined_beyond_the_limit_does_not_cost_the_answer_before_it() -> None:
    """The connection ends behind that answer, and its client, which still sends, can read it."""
    app = EchoApp()
    async with serving(app, LIMITS) as port, RawClient.to(port) as client:
        await client.send(post("/wait"))
        await eventually(lambda: app.open == 1, "it waits")
        await client.send(post("/echo", b"x" * (LIMITS.pipelined_bytes + 5_000)))
        await asyncio.sleep(0.05)  # nothing tells that it was read
        app.go.set()
        await eventually(lambda: not app.open, "it is answered")
        for _ in range(20):
            client.writer.write(b"y" * 1_000)
            await asyncio.sleep(0.002)
        assert (await client.answer()).status == 200
        assert await client.ended() == b""
    assert [path for _, path, _ in app.seen] == ["/wait"]


async def test_what_follows_a_last_request_is_ignored() -> None:
    """After Connection: close nothing is a request."""
    app = EchoApp()
    async with serving(app) as port, RawClient.to(port) as client:
        await client.send(post("/echo", b"1", "Connection: close") + SECOND)
        assert (await client.answer()).headers["connection"] == "close"
        assert await client.ended() == b""
    assert len(app.seen) == 1


async def test_continue_is_said_only_when_the_body_is_wanted() -> None:
    """Expect: 100-continue: an app that reads has it said; one that refuses ends the connection instead."""
    async with serving(EchoApp()) as port:
        async with RawClient.to(port) as client:
            await client.send(post("/echo", b"", "Expect: 100-continue").replace(b"Length: 0", b"Length: 2"))
            assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            await client.send(b"hi")
            assert (await client.answer()).body == b"hi"
        async with RawClient.to(port) as client:
            await client.send(post("/ignore", b"", "Expect: 100-continue").replace(b"Length: 0", b"Length: 2"))
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (401, "close")


def test_a_client_that_left_before_its_body_was_asked_for_is_gone() -> None:
    """[H3] Nothing is written to a closed connection: uvloop would raise, and the request end in a traceback."""
    messages: list[Message] = []

    async def play() -> None:
        left = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/other":
                await EchoApp()(scope, receive, send)
                return
            await left.wait()
            messages.append(await receive())

        async with serving(app) as port:
            async with RawClient.to(port) as client:
                await client.send(post("/late", b"", "Expect: 100-continue").replace(b"Length: 0", b"Length: 2"))
                client.reset()
            for _ in range(3):  # by then the server has seen the reset, too
                async with RawClient.to(port) as other:
                    await other.send(post("/other", b"hi"))
                    assert (await other.answer()).body == b"hi"
            left.set()
            await eventually(lambda: messages, "the app is told")

    uvloop.run(play())
    assert [message["type"] for message in messages] == ["http.disconnect"]


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x: y\r\n" * 500 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nx: " + b"y" * 70_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"y" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\nx: " + b"y" * 300_000, 431),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 505),
        (b"GET /\r\n\r\n", 505),
        (b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        (b"\x16\x03\x01\x02\x00\x01", 400),
    ],
)
async def test_what_is_no_request_gets_the_error_object(request_bytes: bytes, status: int) -> None:
    """Heads that are too large or no HTTP are refused in JSON, and the connection ends."""
    app = EchoApp()
    async with serving(app) as port, RawClient.to(port) as client:
        await client.send(request_bytes)
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (status, "close")
        assert answer.body.startswith(b'{"error": {"message": ')
        assert await client.ended() == b""
    assert not app.seen


async def test_a_head_without_an_end_is_cut() -> None:
    """[B1] A header line that goes on and on, or empty lines before a request, end long before they fill memory."""
    async with serving(EchoApp(), LIMITS) as port:
        for beginning, endless in ((b"GET / HTTP/1.1\r\nx: ", b"a" * 65_536), (b"\r\n", b"\r\n" * 32_768)):
            async with RawClient.to(port) as client:
                await client.send(beginning)
                assert await client.send_for_ever(endless, 64 << 20) < 32 << 20


async def test_connections_beyond_the_most_displace_the_longest_idle() -> None:
    """[B9] Connections without a request hold no place that another needs; those with one are kept."""
    app = EchoApp()
    async with (
        serving(app, replace(LIMITS, max_connections=3)) as port,
        RawClient.to(port) as busy,
        RawClient.to(port) as idle,
        RawClient.to(port) as newer,
    ):
        await busy.send(post("/wait"))
        await eventually(lambda: app.open == 1, "one is served")
        async with RawClient.to(port) as another:
            await another.send(post("/echo", b"hi"))
            assert (await another.answer()).body == b"hi"
            assert await idle.ended() == b""
        app.go.set()
        assert (await busy.answer()).status == 200
        await newer.send(post("/echo", b"hi"))
        assert (await newer.answer()).body == b"hi"


async def test_a_client_that_is_gone_when_its_connection_is_ended_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio's transport, unlike uvloop's, finds out when it ends its side: the app was able to answer."""
    answered = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})
        answered.set()

    def not_connected(_: asyncio.Transport) -> None:
        raise OSError(errno.ENOTCONN, "not connected")

    async with serving(app, LIMITS) as port, RawClient.to(port) as client:
        monkeypatch.setattr(type(client.writer.transport), "write_eof", not_connected)
        await client.send(chunked("/"))  # what is left of its body is not waited for
        assert (await client.answer()).body == b"x"
        assert await client.ended() == b""
        assert answered.is_set()
