"""Traffic with known answers: clients that check every answer token by token.

Each request asks a simulated engine in echo mode for a text of cells. A cell is one token
and names its request and its place, so a mixed-up, cut, doubled or incomplete answer shows where it is wrong. Clients
never retry. Their target can be changed at any time, as a load balancer would::

    async with Traffic([http_router]) as traffic:
        await traffic.answered(50)
        traffic.send_to([ray_router])
    assert traffic.wrong() == []
"""

from __future__ import annotations

import asyncio
import json
import socket
import string
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp

from .sockets import Held
from .sse import read_data
from .waiting import eventually

CELL = 4
"""Characters of a cell: a token of the simulated engine. Three name the request, the last tells the place."""
REQUEST_ID = "x-request-id"

_DIGITS = string.digits + string.ascii_letters
_PLACES = len(_DIGITS)


class Outcome(StrEnum):
    """How a request ended."""

    RIGHT = "right"
    FAILED = "failed"
    """An error: of the connection, as a status, or as an event of a stream."""
    MIXED_UP = "mixed up"
    """Something of another request's answer."""
    BROKEN = "broken"
    """Cells left out, repeated or changed."""
    UNANSWERED = "unanswered"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of request. ``keepalive``: on the client's open connection, not on one of its own."""

    stream: bool
    keepalive: bool
    cells: int

    def __str__(self) -> str:
        connection = "keepalive" if self.keepalive else "new"
        return f"{'stream' if self.stream else 'plain'}, {self.cells} cells, {connection} connection"


@dataclass(slots=True)
class SentRequest:
    """One request and what became of it. Instants are of ``time.monotonic()``; ``port`` is the client's own."""

    number: int
    kind: Kind
    url: str
    begin_s: float
    port: int = 0
    connected_s: float = 0.0
    last_read_s: float = 0.0
    max_silence_s: float = 0.0
    end_s: float = 0.0
    text: str = ""
    outcome: Outcome = Outcome.UNANSWERED
    reason: str = ""

    def __str__(self) -> str:
        return f"request {self.number} ({self.kind}) to {self.url} from port {self.port}: {self.outcome}: {self.reason}"

    def receive(self, piece: str) -> None:
        """More of the answer came."""
        now = time.monotonic()
        self.max_silence_s = max(self.max_silence_s, now - (self.last_read_s or self.begin_s))
        self.last_read_s = now
        self.text += piece

    def end(self, outcome: Outcome, reason: str = "") -> None:
        self.end_s = time.monotonic()
        self.outcome, self.reason = outcome, reason


def cells_text(number: int, cells: int) -> str:
    """What request ``number`` asks, and must be answered."""
    name = _name(number)
    return "".join(name + _DIGITS[place % _PLACES] for place in range(cells))


def check_text(text: str, number: int, cells: int, *, whole: bool = True) -> tuple[Outcome, str]:
    """What an answer is worth, and why. One that is not ``whole`` may end early, but at no wrong place."""
    wanted = cells_text(number, cells)
    if text == wanted or (not whole and wanted.startswith(text)):
        return Outcome.RIGHT, ""
    name = _name(number)
    for at in range(0, max(len(wanted), len(text)), CELL):
        cell, due = text[at : at + CELL], wanted[at : at + CELL]
        if cell == due:
            continue
        if len(cell) == CELL and not cell.startswith(name):
            return Outcome.MIXED_UP, f"cell {at // CELL} is {cell!r}, which belongs to another request"
        return Outcome.BROKEN, f"cell {at // CELL} is {cell!r} in place of {due!r}"
    raise AssertionError("texts of the same cells are equal")


def _name(number: int) -> str:
    digits = ""
    for _ in range(CELL - 1):
        number, digit = divmod(number, _PLACES)
        digits += _DIGITS[digit]
    assert number == 0, "there are more requests than names"
    return digits


class Traffic:
    """``clients`` of one model, each with one request at a time; every third asks for long streams only.

    ``history`` has every request, in the order of their beginning. ``pause_s`` is between an answer and the client's
    next request; ``limit_s`` is how long one request may take.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        clients: int = 12,
        model: str = "sim",
        long_cells: int = 200,
        pause_s: float = 0.02,
        limit_s: float = 60.0,
    ) -> None:
        self.history: list[SentRequest] = []
        self.steps: list[tuple[float, str]] = []
        self.model = model
        self.pause_s = pause_s
        self.limit_s = limit_s
        self.stopping = asyncio.Event()
        self._urls = list(urls)
        self._numbers = count()
        long = Kind(stream=True, keepalive=True, cells=long_cells)
        short = [
            Kind(stream, keepalive, cells=10) for stream, keepalive in ((True, True), (False, False), (True, False))
        ]
        short.append(Kind(stream=False, keepalive=True, cells=10))
        self._clients = [_Client(self, number, [long] if number % 3 == 0 else short) for number in range(clients)]
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self.step("begin")
        self._tasks = [asyncio.create_task(client.run(), name="traffic") for client in self._clients]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends when every request that was sent has its answer or its limit."""
        self.step("end")
        self.stopping.set()
        if error is not None:
            for task in self._tasks:
                task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        if error is None:
            for problem in ended:
                if problem is not None:
                    raise problem

    def send_to(self, urls: Sequence[str]) -> None:
        """Where requests go from now on, in turn. Those on their way are left alone."""
        self._urls = list(urls)

    def step(self, name: str) -> None:
        """Name what is done now: ``steps`` divides the history."""
        self.steps.append((time.monotonic(), name))

    def next(self, kind: Kind) -> SentRequest:
        """The next request, entered into the history."""
        number = next(self._numbers)
        sent = SentRequest(number, kind, self._urls[number % len(self._urls)], time.monotonic())
        self.history.append(sent)
        return sent

    async def answered(self, more: int, *, limit_s: float = 60.0) -> None:
        """Wait until ``more`` requests have been answered that begin from now on."""
        first = len(self.history)

        def enough() -> bool:
            assert not any(task.done() for task in self._tasks), "a client has ended early"
            return sum(sent.end_s > 0 for sent in self.history[first:]) >= more

        await eventually(enough, f"{more} more requests are answered", limit_s=limit_s, every_s=0.05)

    async def streaming(self, *, limit_s: float = 30.0) -> None:
        """Wait until half the clients of long streams are early in one, so that what is done next meets streams."""
        longest = max(client.kinds[0].cells for client in self._clients)
        wanted = max(1, sum(client.kinds[0].cells == longest for client in self._clients) // 2)

        def enough() -> bool:
            running = [sent for sent in self.history if sent.kind.cells == longest and not sent.end_s]
            return sum(0 < len(sent.text) < longest * CELL // 2 for sent in running) >= wanted

        await eventually(enough, f"{wanted} long streams run", limit_s=limit_s, every_s=0.01)

    def wrong(self, *expected: Held) -> list[str]:
        """Every request that went wrong, in words. A failure on a connection of ``expected`` is none; all else is."""
        return [
            str(sent)
            for sent in self.history
            if sent.outcome is not Outcome.RIGHT and not is_expected_failure(sent, expected)
        ]


def is_expected_failure(sent: SentRequest, expected: Iterable[Held]) -> bool:
    """Whether a request failed, and only failed, on a connection that its killed server held."""
    return sent.outcome is Outcome.FAILED and any(
        sent.port in held.ports and sent.connected_s <= held.at_s for held in expected
    )


_Opened = dict[int, tuple[int, float]]
"""By the router's port: the client's port of the latest connection to it, and when that was opened."""


class _Client:
    """One client. Its connections, one to each router, are its own."""

    def __init__(self, traffic: Traffic, number: int, kinds: Sequence[Kind]) -> None:
        self.kinds = kinds
        self._traffic = traffic
        self._turn = number

    async def run(self) -> None:
        """Ask until told to stop."""
        opened: _Opened = {}
        async with self._session(opened) as session:
            while not self._traffic.stopping.is_set():
                sent = self._traffic.next(self.kinds[self._turn % len(self.kinds)])
                self._turn += 1
                if sent.kind.keepalive:
                    await self._ask(session, opened, sent)
                else:
                    own: _Opened = {}
                    async with self._session(own) as once:
                        await self._ask(once, own, sent)
                await asyncio.sleep(self._traffic.pause_s)

    def _session(self, opened: _Opened) -> aiohttp.ClientSession:
        def open_socket(info: tuple[Any, ...]) -> socket.socket:
            # Bound before it connects: its port must be known even of a connection that never comes to be.
            family, kind, protocol, _, address = info
            made = socket.socket(family, kind, protocol)
            made.bind(("127.0.0.1", 0))
            made.setblocking(False)
            opened[address[1]] = (made.getsockname()[1], time.monotonic())
            return made

        connector = aiohttp.TCPConnector(keepalive_timeout=60, socket_factory=open_socket)
        return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=self._traffic.limit_s))

    async def _ask(self, session: aiohttp.ClientSession, opened: _Opened, sent: SentRequest) -> None:
        request_id = f"traffic-{sent.number}"
        body = {
            "model": self._traffic.model,
            "messages": [{"role": "user", "content": cells_text(sent.number, sent.kind.cells)}],
            "stream": sent.kind.stream,
        }
        try:
            async with session.post(
                f"{sent.url}/v1/chat/completions", json=body, headers={REQUEST_ID: request_id}
            ) as answer:
                reason = await _read(answer, sent)
                answered_id = answer.headers.get(REQUEST_ID)
        except TimeoutError:
            sent.end(Outcome.UNANSWERED, f"not whole after {self._traffic.limit_s:g} s")
        except (aiohttp.ClientError, OSError) as error:
            _failed(sent, f"{type(error).__name__}: {error}")
        else:
            if reason:
                _failed(sent, reason)
            elif answered_id != request_id:
                sent.end(Outcome.MIXED_UP, f"the answer is called {answered_id}")
            else:
                sent.end(*check_text(sent.text, sent.number, sent.kind.cells))
        finally:
            sent.port, sent.connected_s = opened.get(urlsplit(sent.url).port or 80, (0, 0.0))


def _failed(sent: SentRequest, reason: str) -> None:
    """What came before the failure must be right all the same."""
    outcome, why = check_text(sent.text, sent.number, sent.kind.cells, whole=False)
    sent.end(*((Outcome.FAILED, reason) if outcome is Outcome.RIGHT else (outcome, why)))


async def _read(answer: aiohttp.ClientResponse, sent: SentRequest) -> str:
    """Read the whole answer; why it is an error, empty if it is none."""
    if answer.status != 200:
        return f"status {answer.status}: {(await answer.text())[:300]}"
    if not sent.kind.stream:
        sent.receive((await answer.json())["choices"][0]["message"]["content"])
        return ""
    ids: set[str] = set()
    finished = 0
    ended = False
    async for data in read_data(answer):
        if ended:
            return f"{data[:100]!r} after the end mark"
        if data == "[DONE]":
            ended = True
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            return f"error event {chunk['error']}"
        ids.add(chunk["id"])
        for choice in chunk["choices"]:
            finished += choice.get("finish_reason") is not None
            if piece := choice["delta"].get("content"):
                sent.receive(piece)
    if (ended, finished, len(ids)) != (True, 1, 1):
        return f"{'an' if ended else 'no'} end mark, {finished} finish reasons, {len(ids)} ids"
    return ""
