"""The load generator counts nothing but whole right answers: whatever else a server says ends its run with a reason."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from bench import native
from telemetry.environment import free_port

TOKENS = 4
_MARKER = re.compile(rb"\[bench ([0-9a-f]{16}) ")
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


def plain(marker: str, *, text: str = "", tokens: int = TOKENS) -> bytes:
    """A whole answer to a plain chat."""
    content = text or "".join(f"{marker}.{k} " for k in range(TOKENS))
    message = {"role": "assistant", "content": content}
    body = {"choices": [{"index": 0, "message": message}], "usage": {"completion_tokens": tokens}}
    data = json.dumps(body).encode()
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def events(marker: str) -> list[str]:
    """The events of a whole stream."""
    deltas = [{"role": "assistant", "content": ""}, *({"content": f"{marker}.{k} "} for k in range(TOKENS))]
    chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    usage = {"choices": [], "usage": {"completion_tokens": TOKENS}}
    return [*map(json.dumps, chunks), json.dumps(usage), "[DONE]"]


def streamed(of: list[str], *, end: bytes = b"0\r\n\r\n") -> bytes:
    """``of`` as an event stream, cut into chunks at odd places."""
    data = "".join(f"data: {event}\n\n" for event in of).encode()
    pieces = [data[at : at + 37] for at in range(0, len(data), 37)]
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + end


def without(marker: str, index: int) -> list[str]:
    found = events(marker)
    del found[index]
    return found


OTHER = "f" * 16
Server = Callable[[str], bytes]
WRONG_PLAIN: dict[str, tuple[Server, str]] = {
    "another's marker": (lambda _: plain(OTHER), "not the token that comes next"),
    "one token of another": (lambda m: plain(m, text=f"{m}.0 {m}.1 {OTHER}.2 {m}.3 "), "not the token that comes next"),
    "a short text": (lambda m: plain(m, text=f"{m}.0 {m}.1 "), "fewer tokens"),
    "a long text": (lambda m: plain(m, text="".join(f"{m}.{k} " for k in range(TOKENS + 1))), "more tokens"),
    "usage of another": (lambda m: plain(m, tokens=7), "usage of another answer"),
    "a body that ends early": (lambda m: plain(m)[:-1] + b" ", "no whole chat"),
    "bytes too many": (lambda m: plain(m) + b"x", "bytes behind the end"),
    "an error": (lambda _: b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", "not 200"),
    "no length": (lambda _: b"HTTP/1.1 200 OK\r\n\r\n", "neither a length nor chunks"),
    "a connection that is not kept": (
        lambda m: plain(m).replace(b"\r\n", b"\r\nConnection: close\r\n", 1),
        "closes the connection",
    ),
}
WRONG_STREAMS: dict[str, tuple[Server, str]] = {
    "another's marker": (lambda _: streamed(events(OTHER)), "not the token that comes next"),
    "a token missing": (lambda m: streamed(without(m, 2)), "not the token that comes next"),
    "a token twice": (lambda m: streamed([*events(m)[:2], *events(m)[1:]]), "not the token that comes next"),
    "the last token missing": (lambda m: streamed(without(m, TOKENS)), "fewer tokens"),
    "no usage": (lambda m: streamed(without(m, -2)), "no usage"),
    "no [DONE]": (lambda m: streamed(without(m, -1)), "without [DONE]"),
    "an event behind [DONE]": (lambda m: streamed([*events(m), "{}"]), "behind [DONE]"),
    "half an event": (lambda m: streamed([*events(m)[:-1], '{"choices": ', "[DONE]"]), "no whole JSON"),
    "an error within": (lambda m: streamed(events(m)).replace(b"data: [DO", b"fail: [DO"), "no data"),
    "a chunk without a size": (lambda m: streamed(events(m), end=b"\r\n\r\n"), "without a size"),
}


@asynccontextmanager
async def serving(server: Server, *, cut: int | None = None, silent: bool = False) -> AsyncIterator[int]:
    """A server on a port whose every answer is ``server(marker)``; after ``cut`` bytes of it the connection closes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length, marker = _LENGTH.search(head), None
                assert length is not None
                marker = _MARKER.search(await reader.readexactly(int(length[1])))
                assert marker is not None
                if silent:
                    await asyncio.sleep(60)
                writer.write(server(marker[1].decode())[:cut])
                await writer.drain()
                if cut is not None:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()


async def load(port: int, *options: str) -> tuple[int, dict[str, object], str]:
    """Exit code, result and error output of a short run."""
    process = await asyncio.create_subprocess_exec(
        *(str(native.load_generator()), "--port", str(port), "--clients", "3", "--seconds", "0.2", "--warmup", "0.1"),
        *("--min-tokens", str(TOKENS), "--max-tokens", str(TOKENS), *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await asyncio.wait_for(process.communicate(), 30)
    lines = out.decode().splitlines()
    result = json.loads(lines[-1]) if process.returncode == 0 else {}
    return process.returncode or 0, result, errors.decode()


@pytest.mark.parametrize("stream", ["0", "1"])
async def test_whole_right_answers_count(stream: str) -> None:
    """What the other tests change is right as it is."""
    async with serving(lambda marker: streamed(events(marker)) if stream == "1" else plain(marker)) as port:
        code, result, errors = await load(port, "--stream", stream)
    assert (code, errors) == (0, "")
    assert int(str(result["requests"])) > 0
    assert set(result["latency_us"]) == {"p50", "p90", "p99"}  # type: ignore[call-overload]


@pytest.mark.parametrize("case", WRONG_PLAIN)
async def test_a_wrong_plain_answer_ends_the_run(case: str) -> None:
    """No figure comes out of a run in which an answer was wrong, short or another's."""
    server, reason = WRONG_PLAIN[case]
    async with serving(server) as port:
        code, _, errors = await load(port)
    assert code == 1
    assert reason in errors


@pytest.mark.parametrize("case", WRONG_STREAMS)
async def test_a_wrong_stream_ends_the_run(case: str) -> None:
    """No figure comes out of a run in which a stream lacked, repeated or mixed up anything."""
    server, reason = WRONG_STREAMS[case]
    async with serving(server) as port:
        code, _, errors = await load(port, "--stream", "1")
    assert code == 1
    assert reason in errors


@pytest.mark.parametrize(("stream", "cut"), [("0", 30), ("0", 90), ("1", 200), ("1", -5)])
async def test_an_answer_cut_short_ends_the_run(stream: str, cut: int) -> None:
    """A connection that closes within head, body, stream, or before the last chunk is a failure."""
    async with serving(lambda m: streamed(events(m)) if stream == "1" else plain(m), cut=cut) as port:
        code, _, errors = await load(port, "--stream", stream)
    assert code == 1
    assert "closed the connection before its answer was complete" in errors


async def test_a_dead_server_ends_the_run() -> None:
    """Nobody listens there."""
    code, _, errors = await load(free_port())
    assert code == 1
    assert "no connection" in errors


async def test_a_silent_server_ends_the_run() -> None:
    """It takes the request and says nothing: no run waits for ever."""
    async with serving(plain, silent=True) as port:
        code, _, errors = await load(port, "--silence", "0.3")
    assert code == 1
    assert "no byte of the answer came for too long" in errors
