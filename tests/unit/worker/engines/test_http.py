"""An engine reached by HTTP, against servers that behave and servers that do not."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from queue_schemas import BadRequest, EngineFailed, EngineState, new_job_id
from scheduling.slots import EngineLoad
from telemetry.environment import free_port
from tests.support.garbage import alive, without_collection
from tests.support.waiting import eventually
from worker.engines import EngineCall, EngineGone, http, http_call, new_call_id
from worker.engines.connection import PAUSE_BYTES, EngineConnection
from worker.engines.http import HttpEngine

Respond = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
CALL = EngineCall(
    "/v1/chat/completions", b'{"n":1}', call_id="0d4f9c2e-7a51-4b3c-8e2d-000000000001", traceparent="00-aa-bb-01"
)


class RawServer:
    """Reads requests and hands each, head and body, to ``respond``, which writes whatever it likes."""

    def __init__(self, respond: Respond) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self.closed = 0
        self.port = 0
        self._respond = respond

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
                request = head + await reader.readexactly(size)
                self.requests.append(request)
                await self._respond(request, reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            self.closed += 1
        finally:
            writer.close()


@asynccontextmanager
async def engine_that(respond: Respond, path: str = "") -> AsyncIterator[tuple[HttpEngine, RawServer]]:
    raw = RawServer(respond)
    server = await asyncio.start_server(raw.accept, "127.0.0.1", 0)
    raw.port = server.sockets[0].getsockname()[1]
    engine = HttpEngine(f"http://127.0.0.1:{raw.port}{path}", api_key="engine-key")
    try:
        yield engine, raw
    finally:
        await engine.stop(1)
        server.close()


def says(answer: bytes) -> Respond:
    async def respond(_request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    return respond


def then_closes(answer: bytes) -> Respond:
    async def respond(_request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    return respond


PLAIN = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


async def test_a_call_carries_body_ids_and_the_engines_own_key() -> None:
    """The client's bytes go untouched, with content type, request id, trace and the worker's bearer token."""
    async with engine_that(says(PLAIN)) as (engine, raw), engine.call(CALL) as answer:
        assert (answer.status, answer.content_type) == (200, "application/json")
        assert await answer.read(100) == b"{}"
    head, _, body = raw.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    for line in (
        b"authorization: Bearer engine-key",
        b"x-request-id: 0d4f9c2e-7a51-4b3c-8e2d-000000000001",
        b"traceparent: 00-aa-bb-01",
    ):
        assert line in head
    assert body == CALL.body


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
async def test_the_base_url_may_end_in_v1(path: str) -> None:
    """People paste both forms."""
    async with engine_that(says(PLAIN), path) as (engine, raw):
        async with engine.call(CALL) as answer:
            await answer.read(100)
        assert raw.requests[0].startswith(b"POST /v1/chat/completions ")


async def test_connections_are_used_again() -> None:
    """Calls one after the other share a connection."""
    async with engine_that(says(PLAIN)) as (engine, raw):
        for _ in range(5):
            async with engine.call(CALL) as answer:
                await answer.read(100)
        assert raw.connections == 1


async def test_a_connection_that_the_engine_closed_is_not_used_again() -> None:
    """``Connection: close`` and closed idle connections cost a new connection, not a failed call."""
    closing = PLAIN.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    async with engine_that(then_closes(closing)) as (engine, raw):
        for _ in range(3):
            async with engine.call(CALL) as answer:
                assert await answer.read(100) == b"{}"
        assert raw.connections == 3


async def test_a_kept_connection_that_closes_when_used_again_costs_no_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine closed it as idle while the request was on its way: nothing was answered, so it is sent once more."""
    monkeypatch.setattr(http_call, "REPOST_LIMIT_S", 5.0)  # a loaded machine is slow to see it

    async def respond(_request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(raw.requests) == 2:
            writer.close()
        else:
            writer.write(PLAIN)

    async with engine_that(respond) as (engine, raw):
        for _ in range(2):
            async with engine.call(CALL) as answer:
                assert await answer.read(100) == b"{}"
        assert (raw.connections, len(raw.requests)) == (2, 3)


@pytest.mark.parametrize(("beginning", "requests"), [(b"HTTP/1.1 200", 2), (b"", 3)])
async def test_a_request_is_repeated_only_if_nothing_was_answered_and_only_once(
    beginning: bytes, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a head is an answer that broke; a new connection that closes is an engine that fails."""
    monkeypatch.setattr(http_call, "REPOST_LIMIT_S", 5.0)

    async def respond(_request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(raw.requests) == 1:
            writer.write(PLAIN)
        else:
            writer.write(beginning)
            await writer.drain()
            writer.close()

    async with engine_that(respond) as (engine, raw):
        async with engine.call(CALL) as answer:
            await answer.read(100)
        with pytest.raises(EngineFailed):
            async with engine.call(CALL):
                pass
        assert len(raw.requests) == requests


async def test_a_kept_connection_that_closes_later_was_no_idle_one() -> None:
    """[D3] The engine has had the request for a while, and may have worked on it: it is not sent again unseen."""
    assert http_call.REPOST_LIMIT_S <= 0.05

    async def respond(_request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(raw.requests) == 1:
            writer.write(PLAIN)
        else:
            await asyncio.sleep(2 * http_call.REPOST_LIMIT_S)
            writer.close()

    async with engine_that(respond) as (engine, raw):
        async with engine.call(CALL) as answer:
            await answer.read(100)
        with pytest.raises(EngineGone):
            async with engine.call(CALL):
                pass
        assert (raw.connections, len(raw.requests)) == (1, 2)


def refuses(refused: Callable[[bytes], bool], status: bytes = b"400 Bad Request") -> Respond:
    """An engine that refuses requests whose header lines it does not like, with an empty body."""

    async def respond(request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = request.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]
        refusal = b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\n\r\n"
        writer.write(refusal if any(map(refused, lines)) else PLAIN)

    return respond


def is_no_uuid(line: bytes) -> bool:
    name, _, value = line.partition(b": ")
    if name.lower() != b"x-request-id":
        return False
    try:
        return uuid.UUID(value.decode()).version != 4
    except ValueError:
        return True


def is_unknown(line: bytes) -> bool:
    known = (b"host", b"accept", b"authorization", b"content-type", b"content-length")
    return line.partition(b":")[0].lower() not in known


async def test_an_engine_that_wants_a_uuid_as_request_id_gets_one() -> None:
    """[E3] llama-cpp-python's server answers 400 to any other id."""
    job_id = new_job_id(3)
    async with engine_that(refuses(is_no_uuid)) as (engine, raw):
        for _ in range(3):
            async with engine.call(EngineCall(CALL.path, CALL.body, call_id=new_call_id(job_id))) as answer:
                assert answer.status == 200
    ids = {request.partition(b"x-request-id: ")[2].partition(b"\r\n")[0].decode() for request in raw.requests}
    assert len(ids) == 3, "no two calls share an id"
    assert {call_id[:13] for call_id in ids} == {f"{job_id[2:10]}-{job_id[10:14]}"}


@pytest.mark.parametrize("status", [b"400 Bad Request", b"422 Unprocessable Content"])
async def test_an_engine_that_dislikes_headers_is_served_without_them(status: bytes) -> None:
    """[E3] It refuses the first request, and never again gets what it does not know."""
    async with engine_that(refuses(is_unknown, status)) as (engine, raw):
        for _ in range(3):
            async with engine.call(CALL) as answer:
                assert (answer.status, await answer.read(100)) == (200, b"{}")
    assert [b"x-request-id" in request for request in raw.requests] == [True, False, False, False]


async def test_a_request_that_is_refused_for_itself_is_not_asked_twice_for_ever() -> None:
    """[E3] Once an engine has taken optional headers, its 400 is about the request: it is passed on at once."""

    async def respond(request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(PLAIN if request.endswith(b"good") else PLAIN.replace(b"200 OK", b"400 Bad Request"))

    async with engine_that(respond) as (engine, raw):
        for body, requests in ((b"bad", 2), (b"good", 3), (b"bad", 4)):
            async with engine.call(EngineCall(CALL.path, body, call_id=CALL.call_id)) as answer:
                assert (answer.status, await answer.read(100)) == (200 if body == b"good" else 400, b"{}")
            assert len(raw.requests) == requests
    assert b"x-request-id" in raw.requests[-1]


@pytest.mark.parametrize(
    ("line", "least", "most"),
    [
        (b"Retry-After: 7", 7.0, 7.0),
        (b"retry-after: 0", 0.0, 0.0),
        (b"Retry-After-Ms: 1500", 1.5, 1.5),
        (b"Retry-After: {in an hour}", 3_000, 3_600),
        (b"Retry-After: Wed, 21 Oct 2015 07:28:00 GMT", 0.0, 0.0),
    ],
)
async def test_an_engine_may_say_when_to_come_back(line: bytes, least: float, most: float) -> None:
    """[C8] In seconds, in milliseconds or as a date, which may be over."""
    in_an_hour = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    line = line.replace(b"{in an hour}", in_an_hour.encode())
    busy = b"HTTP/1.1 503 Service Unavailable\r\n" + line + b"\r\ncontent-length: 0\r\n\r\n"
    async with engine_that(says(busy)) as (engine, _), engine.call(CALL) as answer:
        assert answer.retry_after_s is not None
        assert least <= answer.retry_after_s <= most


@pytest.mark.parametrize(
    "line", [b"x: y", b"Retry-After: soon", b"Retry-After: -1", b"Retry-After: \xb2", b"Retry-After:"]
)
async def test_a_retry_after_without_a_time_is_ignored(line: bytes) -> None:
    """[C8] Nonsense is as good as nothing."""
    busy = b"HTTP/1.1 503 Service Unavailable\r\n" + line + b"\r\ncontent-length: 0\r\n\r\n"
    async with engine_that(says(busy)) as (engine, _), engine.call(CALL) as answer:
        assert (answer.status, answer.retry_after_s) == (503, None)


async def test_a_status_that_there_is_not_is_the_engines_failure() -> None:
    """It does not travel on: a Router could not answer with it, and would drop what came along with it."""

    async def respond(_request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(PLAIN.replace(b" 200 ", b" 799 "))

    async with engine_that(respond) as (engine, _raw):
        with pytest.raises(EngineFailed, match="does not speak HTTP"):
            async with engine.call(CALL):
                pass


@pytest.mark.parametrize("late", [False, True])
async def test_bytes_behind_an_answer_never_begin_the_next_one(late: bool) -> None:
    """What an engine sends unasked, at once or later, ends the connection instead of answering another client."""
    stray = PLAIN.replace(b"{}", b"!!")
    later = asyncio.Event()

    async def respond(_request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(raw.requests) > 1:
            writer.write(PLAIN)
            return
        writer.write(PLAIN + (b"" if late else stray))
        if late:
            await later.wait()
            writer.write(stray)

    async with engine_that(respond) as (engine, raw):
        async with engine.call(CALL) as answer:
            assert await answer.read(100) == b"{}"
        later.set()
        await eventually(lambda: not late or raw.closed == 1, "the connection is dropped")
        async with engine.call(CALL) as answer:
            assert await answer.read(100) == b"{}"
        assert raw.connections == 2


@pytest.mark.parametrize("body", [b"", b"7\r\nfirst\n\n\r\n"])
async def test_what_was_not_read_of_an_answer_never_begins_the_next_one(body: bytes) -> None:
    """An attempt that is aborted just when its answer's end has come, or that does not care for an error's body, leaves
    something unread: the next request, another client's, gets its own answer on another connection."""
    own = CHUNKED + b"5\r\nown\n\n\r\n0\r\n\r\n"

    async def respond(request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rest = b"6\r\nlast\n\n\r\n0\r\n\r\n"
        if request.endswith(b"next"):
            writer.write(own)
            return
        writer.write(CHUNKED + (body or rest))
        if body:
            await goes_on.wait()
            writer.write(rest)

    goes_on = asyncio.Event()
    async with engine_that(respond) as (engine, raw):
        call = engine.call(CALL)
        async with call as answer:
            if body:
                pieces = answer.chunks()
                assert await anext(pieces) == b"first\n\n"
                goes_on.set()
            connection = call._connection
            assert connection is not None
            await eventually(lambda: connection.complete, "the end has come, unread")
        async with engine.call(EngineCall(CALL.path, b"next")) as answer:
            assert await answer.read(100) == b"own\n\n"
        assert raw.connections == 2


async def test_what_arrived_on_an_idle_connection_is_no_answer_even_if_nobody_looked_yet() -> None:
    """Bytes that lie in the socket when a connection is taken again were sent before the request: it is dropped."""
    writers: list[asyncio.StreamWriter] = []

    async def respond(_request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(PLAIN)

    async with engine_that(respond) as (engine, raw):
        async with engine.call(CALL) as answer:
            assert await answer.read(100) == b"{}"
        # Not through the event loop: nobody sees them before the next call begins.
        os.write(writers[0].get_extra_info("socket").fileno(), PLAIN.replace(b"{}", b"!!"))
        async with engine.call(CALL) as answer:
            assert await answer.read(100) == b"{}"
        assert raw.connections == 2


async def test_pieces_that_arrived_meanwhile_are_one_read() -> None:
    """A reader that was busy gets everything at once."""

    async def respond(_request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED)
        for part in (b"a\n\n", b"b\n\n", b"c\n\n"):
            writer.write(b"3\r\n" + part + b"\r\n")
        writer.write(b"0\r\n\r\n")

    async with engine_that(respond) as (engine, _), engine.call(CALL) as answer:
        assert b"".join([piece async for piece in answer.chunks()]) == b"a\n\nb\n\nc\n\n"


async def test_a_stream_that_breaks_is_an_engine_failure() -> None:
    """What came is given, then the failure."""
    async with engine_that(then_closes(CHUNKED + b"3\r\na\n\n\r\n")) as (engine, _):
        pieces = []
        with pytest.raises(EngineFailed, match="before its answer was complete"):
            async with engine.call(CALL) as answer:
                pieces.extend([piece async for piece in answer.chunks()])
                assert pieces == [b"a\n\n"]


async def test_a_body_that_is_cut_short_is_an_engine_failure() -> None:
    """Fewer bytes than announced are no answer."""
    async with engine_that(then_closes(PLAIN[:-1])) as (engine, _):
        with pytest.raises(EngineFailed):
            async with engine.call(CALL) as answer:
                await answer.read(100)


async def test_a_body_without_a_length_ends_with_its_connection_and_says_so() -> None:
    """[C3] The oldest way to end an answer is understood, and told apart from an answer that says where it ends."""
    old = b"HTTP/1.0 200 OK\r\n\r\nold"
    chunked = CHUNKED + b"3\r\nold\r\n0\r\n\r\n"
    empty = b"HTTP/1.1 204 No Content\r\n\r\n"
    for whole, body, delimited in ((old, b"old", False), (chunked, b"old", True), (empty, b"", True)):
        async with engine_that(then_closes(whole)) as (engine, _), engine.call(CALL) as answer:
            assert await answer.read(100) == body
            assert answer.delimited is delimited


@pytest.mark.parametrize("answer", [b"", b"SMTP ready\r\n\r\n", b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000])
async def test_what_is_no_http_answer_is_an_engine_failure(answer: bytes) -> None:
    """Closing without an answer, another protocol, a head without end."""
    async with engine_that(then_closes(answer)) as (engine, _):
        with pytest.raises(EngineFailed):
            async with engine.call(CALL):
                pass


async def test_an_interim_answer_is_passed_over() -> None:
    """100 Continue is not the answer."""
    async with engine_that(says(b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN)) as (engine, _), engine.call(CALL) as answer:
        assert (answer.status, await answer.read(100)) == (200, b"{}")


async def test_nothing_that_an_interim_answer_says_holds_for_the_one_that_follows() -> None:
    """[H40] Early hints with a length, a type and a Retry-After change nothing of the answer proper."""
    hints = b"HTTP/1.1 103 Early Hints\r\nretry-after: 9\r\ncontent-type: text/html\r\ncontent-length: 0\r\n\r\n"
    answers = hints + b"HTTP/1.1 200 OK\r\n\r\n{}"
    async with engine_that(then_closes(answers)) as (engine, _), engine.call(CALL) as answer:
        assert (answer.status, await answer.read(100), answer.delimited) == (200, b"{}", False)
        assert (answer.content_type, dict(answer.headers)) == ("application/octet-stream", {})


async def test_trailers_change_nothing_of_their_answer() -> None:
    """[H40] What stands behind the last chunk is neither the answer's type nor one of its headers."""
    trailers = b"2\r\n{}\r\n0\r\nretry-after: 5\r\ncontent-type: x/y\r\n\r\n"
    async with engine_that(says(CHUNKED + trailers)) as (engine, _), engine.call(CALL) as answer:
        assert await answer.read(100) == b"{}"
        assert (answer.content_type, dict(answer.headers)) == ("text/event-stream", {})


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c", "another protocol"),
        (b"101 Switching Protocols", "another protocol"),
        (b"200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 2", "'gzip', which the worker did not ask for"),
        (b"200 OK\r\nContent-Encoding: BR\r\ntransfer-encoding: chunked", "'br', which the worker did not ask for"),
        (b"200 OK\r\ntransfer-encoding: gzip, chunked", "'gzip, chunked', which the worker did not ask for"),
        (b"200 OK\r\ntransfer-encoding: gzip", "'gzip', which the worker did not ask for"),
    ],
)
async def test_an_answer_in_a_form_that_nobody_asked_for_is_refused(head: bytes, words: str) -> None:
    """[H41] Compressed bytes never reach a client as text, nor does another protocol: a sentence says what to change,
    and the engine is not taken for one that crashed."""
    async with engine_that(says(b"HTTP/1.1 " + head + b"\r\n\r\n2\r\n{}\r\n0\r\n\r\n")) as (engine, _):
        with pytest.raises(EngineFailed, match=words) as caught:
            async with engine.call(CALL) as answer:
                await answer.read(100)
        assert not isinstance(caught.value, EngineGone)


async def test_the_identity_coding_is_none() -> None:
    """[H41] Old servers name it, and end the answer with the connection."""
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: identity\r\ncontent-encoding: identity\r\n\r\n"
    async with engine_that(then_closes(head + b"{}")) as (engine, _), engine.call(CALL) as answer:
        assert await answer.read(100) == b"{}"


async def test_the_case_of_a_content_type_says_nothing() -> None:
    """[H42] A stream is one however its type is written; parameters stay as they came."""
    upper = b"HTTP/1.1 200 OK\r\nContent-Type: Text/Event-Stream; Charset=UTF-8\r\ncontent-length: 2\r\n\r\n{}"
    async with engine_that(says(upper)) as (engine, _), engine.call(CALL) as answer:
        assert answer.content_type == "text/event-stream; Charset=UTF-8"


async def test_a_connection_whose_request_was_not_sent_whole_is_not_used_again() -> None:
    """[H43] An engine that answers before it has read the request, and reads no more, does not get the next request
    behind the rest of that one: it has a connection of its own."""
    heads: list[bytes] = []
    done = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(PLAIN)
        await done.wait()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=4096)
    engine = HttpEngine(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        async with asyncio.timeout(10), engine.call(replace(CALL, body=b" " * (32 << 20))) as answer:
            assert await answer.read(100) == b"{}"
        async with asyncio.timeout(10), engine.call(CALL) as answer:
            assert await answer.read(100) == b"{}"
        assert len(heads) == 2
    finally:
        done.set()
        await engine.stop(1)
        server.close()


async def test_an_engine_behind_a_redirect_is_not_ready_and_says_why() -> None:
    """[H44] A page that answers from elsewhere is named as such: the operator gives the URL that it leads to."""
    moved = b"HTTP/1.1 308 Permanent Redirect\r\nlocation: https://there/\r\ncontent-length: 0\r\n\r\n"
    async with engine_that(says(moved)) as (engine, _):
        with pytest.raises(EngineFailed, match="redirect: give the URL that it leads to"):
            await engine.list_models()


@pytest.mark.parametrize("framing", [b"0\r\nx: ", b"2;x="])
async def test_framing_without_an_end_is_an_engine_failure(framing: bytes) -> None:
    """[H49] Trailers and chunk extensions without an end are given up like such a head, and never gathered."""

    async def respond(_request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b"2\r\n{}\r\n" + framing)
        while True:
            writer.write(b"y" * 16_384)
            await writer.drain()

    async with engine_that(respond) as (engine, _), asyncio.timeout(10):
        with pytest.raises(EngineFailed, match="no end in what frames its body"):
            async with engine.call(CALL) as answer:
                await answer.read(100)


async def test_nobody_listening_is_an_engine_failure() -> None:
    """A refused connection says so."""
    engine = HttpEngine(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(EngineFailed, match="cannot be reached"):
        async with engine.call(CALL):
            pass


async def test_leaving_early_closes_the_connection() -> None:
    """The engine sees the end of the connection, upon which it aborts: after a piece, or before any answer."""

    async def respond(_request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b"3\r\na\n\n\r\n")
        await writer.drain()
        await reader.readexactly(1)

    async with engine_that(respond) as (engine, raw):
        async with engine.call(CALL) as answer:
            async for piece in answer.chunks():
                assert piece == b"a\n\n"
                break
        await eventually(lambda: raw.closed == 1, "the engine sees the connection close")


async def test_a_cancelled_call_closes_the_connection_before_any_answer() -> None:
    """A job aborted while the engine is still thinking frees the engine."""

    async def respond(_request: bytes, reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)

    async with engine_that(respond) as (engine, raw):

        async def call() -> None:
            async with engine.call(CALL):
                pass

        task = asyncio.create_task(call())
        await eventually(lambda: raw.requests, "the engine has the request")
        task.cancel()
        await eventually(lambda: raw.closed == 1, "the engine sees the connection close")


async def test_an_answer_larger_than_the_limit_is_not_read_to_its_end() -> None:
    """``read`` stops a little past the limit."""
    size = 4 << 20
    body = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size
    async with engine_that(says(body)) as (engine, _), engine.call(CALL) as answer:
        assert 1_000 < len(await answer.read(1_000)) < size


async def test_a_slow_reader_holds_the_engine() -> None:
    """Unread bytes are bounded: past the bound TCP stops the engine."""
    written = 0

    async def respond(_request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(CHUNKED)
        for _ in range(1_000):
            writer.write(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
            await writer.drain()
            written += 65_536
        writer.write(b"0\r\n\r\n")

    async with engine_that(respond) as (engine, _), engine.call(CALL) as answer:
        stood = -1
        while stood != written:
            stood = written
            await asyncio.sleep(0.1)
        assert written < 16 * PAUSE_BYTES + (8 << 20)
        assert sum([len(piece) async for piece in answer.chunks()]) == 65_536_000


@pytest.mark.parametrize("path", ["@elsewhere/", "relative", "/x HTTP/1.1\r\nhost: y", "/é"])
async def test_a_path_that_is_none_never_reaches_the_engine(path: str) -> None:
    """A path cannot change the host or smuggle a header."""
    async with engine_that(says(PLAIN)) as (engine, raw):
        with pytest.raises(EngineFailed):
            async with engine.call(EngineCall(path, b"")):
                pass
        assert not raw.requests


async def test_a_content_type_that_cannot_be_sent_is_the_clients_fault() -> None:
    """It cannot begin another header, and it is no failure of the engine."""
    async with engine_that(says(PLAIN)) as (engine, raw):
        with pytest.raises(BadRequest):
            async with engine.call(EngineCall("/x", b"", "a/b\r\nx: y")):
                pass
        assert not raw.requests


async def test_ids_that_cannot_be_sent_are_left_out() -> None:
    """A request id or trace that would begin another header costs the id, not the job."""
    async with engine_that(says(PLAIN)) as (engine, raw):
        async with engine.call(EngineCall("/x", b"", call_id="a\r\nx: y", traceparent="é")) as answer:
            assert await answer.read(100) == b"{}"
        assert b"x: y" not in raw.requests[0]
        assert b"x-request-id" not in raw.requests[0]
        assert b"traceparent" not in raw.requests[0]


async def test_it_becomes_ready_and_follows_the_model_list_and_says_when_the_engine_is_away() -> None:
    """The state follows the engine; models that cannot be names are left out."""
    models = b'{"data":[{"id":"base"},{"id":"lora"},{"id":"bad\\nname"}]}'

    async def respond(request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = models if b"/v1/models" in request else b""
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

    changes = 0

    def changed() -> None:
        nonlocal changes
        changes += 1

    async with engine_that(respond) as (engine, _):
        running = asyncio.create_task(engine.run(changed))
        await eventually(lambda: engine.state is EngineState.READY, "the engine is ready")
        assert engine.models == ("base", "lora")
        assert changes == 1
        running.cancel()
    gone = HttpEngine(f"http://127.0.0.1:{free_port()}")
    running = asyncio.create_task(gone.run(changed))
    await eventually(lambda: gone.state is EngineState.FAILED, "the engine is seen to be away")
    assert "cannot be reached" in gone.detail
    running.cancel()


async def test_it_tells_what_the_engine_says_of_its_models() -> None:
    """[C9] As the list has it, and again when that changes; what is new at each look only is no change."""
    length, looks, changes = 4096, 0, 0

    async def respond(request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal looks
        looks += b"/v1/models" in request
        body = b'{"data": [{"id": "m", "created": %d, "max_model_len": %d, "root": "/m"}]}' % (looks, length)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

    def changed() -> None:
        nonlocal changes
        changes += 1

    async with engine_that(respond) as (engine, _):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(http, "_CHECK_READY_S", 0.01)
            running = asyncio.create_task(engine.run(changed))
            await eventually(lambda: engine.cards == {"m": {"max_model_len": 4096, "root": "/m"}}, "its card")
            seen, before = looks, changes
            await eventually(lambda: looks > seen + 3, "further looks")
            assert changes == before
            length = 8192
            await eventually(lambda: engine.cards["m"]["max_model_len"] == 8192, "its new card")
            await eventually(lambda: changes > before, "it is said")
            running.cancel()


@pytest.mark.parametrize(("health", "asks"), [(b"404 Not Found", False), (b"200 OK", True)])
async def test_an_engine_without_a_health_page_is_not_asked_for_its_models_while_it_works(
    health: bytes, asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[E3] llama-cpp-python's server ends a running stream for the sake of the next request, also if that is only for
    the list of models. One with a health page is asked, so that new adapters are seen under load."""
    monkeypatch.setattr(http, "_CHECK_READY_S", 0.02)
    may_end = asyncio.Event()

    async def respond(request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if request.startswith(b"POST"):
            writer.write(CHUNKED)
            await may_end.wait()
            writer.write(b"0\r\n\r\n")
        elif b"/health" in request:
            writer.write(b"HTTP/1.1 " + health + b"\r\ncontent-length: 0\r\n\r\n")
        else:
            body = b'{"data":[{"id":"m"}]}'
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

    def count(path: bytes) -> int:
        return sum(path in request for request in raw.requests)

    async with engine_that(respond) as (engine, raw):
        running = asyncio.create_task(engine.run(lambda: None))
        await eventually(lambda: engine.state is EngineState.READY, "the engine is ready")
        async with engine.call(CALL) as answer:
            models, looks = count(b"/v1/models"), count(b"/health")
            await eventually(lambda: count(b"/health") > looks + 3, "its health is looked at")
            assert (count(b"/v1/models") > models + 1) is asks
            may_end.set()
            assert await answer.read(1) == b""
        await eventually(lambda: count(b"/v1/models") > models + 3, "its models are asked for again")
        assert engine.state is EngineState.READY
        running.cancel()


@pytest.mark.parametrize(
    ("page", "models"),
    [
        (b'{"object":"list","data":[{"id":"a"},{"id":"b"}]}', ("a", "b")),
        (b'{"models":[{"name":"a"}],"data":[{"id":"a","meta":null}]}', ("a",)),
        (b'[{"id":"a","type":"chat"}]', ("a",)),
        (b"[]", ()),
    ],
)
async def test_lists_of_models_have_several_forms(page: bytes, models: tuple[str, ...]) -> None:
    """[E3] OpenAI's, llama.cpp's own server's, and a bare list."""
    async with engine_that(says(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(page) + page)) as (engine, _):
        assert await engine.list_models() == models


@pytest.mark.parametrize("page", [b"<html>", b'{"data": null}', b'"a"', b"[1]", b"{}", b"[" * 200_000])
async def test_an_engine_that_lists_no_models_is_reported(page: bytes) -> None:
    """[E3] [H48] A page of something else makes a sentence, not a fault of ours."""
    async with engine_that(says(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(page) + page)) as (engine, _):
        with pytest.raises(EngineFailed, match="something else than a list of models"):
            await engine.list_models()


def metrics_page(*lines: str) -> bytes:
    page = "".join(f"{line}\n" for line in ("# HELP vllm:x y", *lines, "process_cpu_seconds_total 9.5")).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(page) + page


async def test_progress_is_what_vllm_counts() -> None:
    """It moves with tokens, finished requests, and with the cache that a long prompt fills; nothing else counts.
    Without them it is a number that moves while the server answers."""
    label = '{engine="0",model_name="m"}'
    pages = [
        (f"vllm:generation_tokens_total{label} 40.0", f"vllm:kv_cache_usage_perc{label} 0.1"),
        (f"vllm:generation_tokens_total{label} 41.0", f"vllm:kv_cache_usage_perc{label} 0.1"),
        (f"vllm:generation_tokens_total{label} 41.0", f"vllm:kv_cache_usage_perc{label} 0.2"),
    ]
    found = []
    for lines in pages:
        for noise in ("http_requests_total 1.0", "http_requests_total 2.0"):
            async with engine_that(says(metrics_page(*lines, noise))) as (engine, _):
                found.append(await engine.progress())
    assert found[0::2] == found[1::2]
    assert len(set(found)) == len(pages)
    async with engine_that(says(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")) as (engine, _):
        assert await engine.progress() != await engine.progress()
    assert await HttpEngine(f"http://127.0.0.1:{free_port()}").progress() is None


async def test_a_page_that_does_not_come_in_time_is_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts and says nothing costs the limit, two seconds, not more."""
    assert http.PROGRESS_LIMIT_S == 2.0
    monkeypatch.setattr(http, "PROGRESS_LIMIT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with asyncio.timeout(3):
            assert await HttpEngine(f"http://127.0.0.1:{silent.getsockname()[1]}").progress() is None


async def test_the_load_is_read_from_the_metrics_page() -> None:
    """Of an engine that works, only once it has told a load before."""
    page = metrics_page("vllm:num_requests_waiting 3", "vllm:num_requests_running 4")
    pages = {b"/metrics": page, b"/v1/chat/completions": b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{"}

    async def respond(request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(pages[request.split(b" ")[1]])

    async with engine_that(respond) as (engine, raw):
        async with engine.call(CALL):
            assert await engine.load() is None
        assert len(raw.requests) == 1
        assert await engine.load() == EngineLoad(3, 4)
        async with engine.call(CALL):
            assert await engine.load() == EngineLoad(3, 4)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 404 Not Found\r\ncontent-length: 28\r\n\r\nvllm:num_requests_waiting 3\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nvllm:num_requests_waiting 3\n",
        b"HTTP/1.1 200 OK\r\n\r\nvllm:num_requests_waiting 3\n" + b"#" * http.MAX_LOAD_PAGE_BYTES,
        b"nonsense",
    ],
)
async def test_a_page_that_cannot_be_taken_tells_no_load(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, never complete, too large, or no HTTP."""
    monkeypatch.setattr(http, "PROGRESS_LIMIT_S", 0.3)
    async with engine_that(says(answer)) as (engine, _):
        assert await engine.load() is None
    assert await HttpEngine(f"http://127.0.0.1:{free_port()}").load() is None


async def test_a_closed_connection_is_freed_at_once() -> None:
    """Not only when the garbage collector comes by: a worker makes one for each call that finds none kept."""

    async def respond(_request: bytes, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}")

    async with engine_that(respond) as (engine, _):
        with without_collection():
            before = alive(EngineConnection)
            for _ in range(3):
                async with engine.call(CALL) as answer:
                    assert await answer.read(10) == b"{}"
                    assert alive(EngineConnection) > before
                del answer
                await eventually(lambda: alive(EngineConnection) == before, "the connection is freed")
