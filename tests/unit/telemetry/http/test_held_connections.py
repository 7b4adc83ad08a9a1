"""Answers that are held open: who learns what when either side ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from queue_schemas import OverCapacity
from telemetry.http import held_connections as module
from telemetry.http.held_connections import Held
from tests.support.waiting import eventually


class ResponseWriter:
    """One held answer, as a server sees it."""

    def __init__(self, held: Held) -> None:
        self.sent: list[Any] = []
        self.left = asyncio.Event()
        self.told = 0
        self.task = asyncio.ensure_future(held.answer(self._gone)({"type": "http"}, self._receive, self._send))

    async def _gone(self) -> None:
        self.told += 1

    async def _receive(self) -> Any:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)


async def test_a_client_that_goes_is_told_of_once() -> None:
    """At once, and nothing is sent to it any more."""
    held = Held(lambda: False)
    exchange = ResponseWriter(held)
    await eventually(lambda: held.count == 1, "it is held")
    exchange.left.set()
    await asyncio.wait_for(exchange.task, 1)
    assert (exchange.told, held.count) == (1, 0)
    assert [message.get("more_body") for message in exchange.sent] == [None, True]


async def test_a_server_that_ends_lets_go_and_doubts_nobody() -> None:
    """The answer ends in order; its client has not gone."""
    ending = False
    held = Held(lambda: ending)
    exchange = ResponseWriter(held)
    await eventually(lambda: held.count == 1, "it is held")
    ending = True
    await asyncio.wait_for(exchange.task, 2)
    assert exchange.told == 0
    assert exchange.sent[-1] == {"type": "http.response.body", "body": b""}


async def test_a_held_connection_carries_a_byte_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing in between takes it for idle."""
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    exchange = ResponseWriter(Held(lambda: False))
    await eventually(lambda: len(exchange.sent) >= 4, "beats come")
    exchange.left.set()
    await exchange.task


async def test_their_number_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is refused with an error that says what to do."""
    monkeypatch.setattr(module, "_MOST", 1)
    held = Held(lambda: False)
    exchange = ResponseWriter(held)
    await eventually(lambda: held.count == 1, "it is held")
    with pytest.raises(OverCapacity):
        ResponseWriter(held)
    exchange.left.set()
    await exchange.task
