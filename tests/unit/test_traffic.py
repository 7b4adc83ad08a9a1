"""The traffic of the runs notices what it is there to notice."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from telemetry.environment import free_port
from tests.runs.report import steps_of, table
from tests.support.processes import Child
from tests.support.sockets import held_by, kill_holding
from tests.support.traffic import CELL, Kind, Outcome, SentRequest, Traffic, cells_text, check_text
from tests.support.waiting import eventually

WHOLE = cells_text(7, 5)
FOREIGN = cells_text(8, 5)


@pytest.mark.parametrize(
    ("text", "outcome", "words"),
    [
        (WHOLE, Outcome.RIGHT, ""),
        (FOREIGN, Outcome.MIXED_UP, "cell 0"),
        (WHOLE[:8] + FOREIGN[8:], Outcome.MIXED_UP, "cell 2"),
        (WHOLE[:8] + WHOLE[12:], Outcome.BROKEN, "cell 2"),
        (WHOLE[:8] + WHOLE[4:], Outcome.BROKEN, "cell 2"),
        (WHOLE[:-4], Outcome.BROKEN, "cell 4"),
        (WHOLE[:-1], Outcome.BROKEN, "cell 4"),
        (WHOLE + WHOLE[-4:], Outcome.BROKEN, "cell 5"),
        (WHOLE + FOREIGN[:4], Outcome.MIXED_UP, "cell 5"),
        ("", Outcome.BROKEN, "cell 0"),
    ],
)
def test_an_answer_is_judged_by_its_cells(text: str, outcome: Outcome, words: str) -> None:
    """Another's cell is a mix-up; a gap, a repeat, a cut and a surplus are breaks; each is told by its place."""
    found, why = check_text(text, 7, 5)
    assert found is outcome
    assert why.startswith(words)


def test_half_an_answer_is_right_as_far_as_it_goes() -> None:
    """Of a request that failed, what came before must be right all the same."""
    assert check_text(WHOLE[:10], 7, 5, whole=False)[0] is Outcome.RIGHT
    assert check_text(WHOLE[:4] + WHOLE[8:12], 7, 5, whole=False)[0] is Outcome.BROKEN


Meddle = Callable[[str], str]


@asynccontextmanager
async def server(meddle: Meddle = lambda text: text, status: int = 200) -> AsyncIterator[str]:
    """A server that answers what was sent, as ``meddle`` changes it."""

    async def chat(request: web.Request) -> web.StreamResponse:
        sent = await request.json()
        headers = {"x-request-id": request.headers["x-request-id"]}
        text = meddle(sent["messages"][0]["content"])
        if status != 200 or not sent["stream"]:
            return web.json_response({"choices": [{"message": {"content": text}}]}, status=status, headers=headers)
        answer = web.StreamResponse(headers=headers)
        await answer.prepare(request)
        for at in range(0, len(text), CELL):
            await answer.write(_event(text[at : at + CELL], None))
        await answer.write(_event("", "stop") + b"data: [DONE]\n\n")
        return answer

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


def _event(content: str, finish: str | None) -> bytes:
    chunk = {"id": "chatcmpl-1", "choices": [{"delta": {"content": content}, "finish_reason": finish}]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


async def _outcomes(url: str) -> set[Outcome]:
    async with Traffic([url], clients=4, long_cells=20, pause_s=0.001) as traffic:
        await traffic.answered(30)
    return {sent.outcome for sent in traffic.history}


async def test_right_answers_are_right() -> None:
    """Streams and plain answers, on keepalive and on new connections."""
    async with server() as url, Traffic([url], clients=4, long_cells=20, pause_s=0.001) as traffic:
        await traffic.answered(30)
    assert traffic.wrong() == []
    assert {sent.kind.stream for sent in traffic.history} == {True, False}
    assert all(sent.port for sent in traffic.history)
    ports = [sent.port for sent in traffic.history if sent.kind.keepalive]
    assert len(set(ports)) == 4


@pytest.mark.parametrize(
    ("meddle", "outcome"),
    [
        (lambda text: text[:CELL] + text[2 * CELL :], Outcome.BROKEN),
        (lambda text: text[CELL:2 * CELL] + text[CELL:], Outcome.BROKEN),
        (lambda text: cells_text(4_000, len(text) // CELL), Outcome.MIXED_UP),
    ],
)  # fmt: skip
async def test_wrong_answers_are_noticed(meddle: Meddle, outcome: Outcome) -> None:
    async with server(meddle) as url:
        assert await _outcomes(url) == {outcome}


async def test_errors_are_failures_and_nothing_is_sent_twice() -> None:
    """A status, a port at which nobody listens."""
    async with server(status=503) as url:
        assert await _outcomes(url) == {Outcome.FAILED}
    assert await _outcomes(f"http://127.0.0.1:{free_port()}") == {Outcome.FAILED}


async def test_requests_go_where_they_are_sent() -> None:
    """From the change on every new request goes to the new address."""
    async with server() as one, server() as two, Traffic([one], clients=3, long_cells=20) as traffic:
        await traffic.answered(10)
        traffic.send_to([two])
        first = len(traffic.history)
        traffic.step("moved")
        await traffic.answered(10)
    assert {sent.url for sent in traffic.history[:first]} == {one}
    assert {sent.url for sent in traffic.history[first:]} == {two}
    assert [step.name for step in steps_of(traffic)] == ["begin", "moved", "end"]
    assert table(steps_of(traffic)).count("\n") == 4


_ACCEPTS = """
import socket, sys, time
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
held = server.accept()
time.sleep(60)
"""


async def test_what_a_killed_process_held_is_known(tmp_path: Path) -> None:
    """The connection that it had accepted is its own, the one that still waited is not."""
    port = free_port()
    child = Child("server", [sys.executable, "-c", _ACCEPTS, port], tmp_path / "log")
    child.start()

    async def connect() -> asyncio.StreamWriter | None:
        try:
            return (await asyncio.open_connection("127.0.0.1", port))[1]
        except ConnectionRefusedError:
            return None

    try:
        accepted = await eventually(connect, "it listens")
        assert accepted is not None
        await eventually(lambda: held_by(child.pid, port).ports, "it has accepted one")
        waiting = await connect()
        assert waiting is not None
        held = kill_holding(child.pid, port)
        assert held.ports == {accepted.get_extra_info("sockname")[1]}
        sent = SentRequest(1, Kind(stream=True, keepalive=True, cells=3), "", 0.0, port=next(iter(held.ports)))
        sent.end(Outcome.FAILED, "reset")
        traffic = Traffic([""])
        traffic.history = [sent]
        assert traffic.wrong(held) == []
        assert len(traffic.wrong()) == 1
        sent.end(Outcome.BROKEN, "a gap")
        assert len(traffic.wrong(held)) == 1, "only failures are expected"
        sent.end(Outcome.FAILED, "reset")
        sent.connected_s = held.at_s + 1
        assert len(traffic.wrong(held)) == 1, "a later connection from the same port is another one"
    finally:
        child.kill()
        accepted.close()
        waiting.close()
