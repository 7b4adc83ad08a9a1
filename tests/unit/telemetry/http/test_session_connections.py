"""Session connections: what each side learns when the other ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from queue_schemas import OverCapacity
from telemetry.http import session_connections as module
from telemetry.http.session_connections import SessionConnections
from tests.support.waiting import eventually


class Client:
    """One session connection, as its server sees it."""

    def __init__(self, connections: SessionConnections) -> None:
        self.sent: list[Any] = []
        self.left = asyncio.Event()
        self.notified = 0
        self.task = asyncio.ensure_future(connections.answer(self._gone)({"type": "http"}, self._receive, self._send))

    async def _gone(self) -> None:
        self.notified += 1

    async def _receive(self) -> Any:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)


async def test_a_disconnect_is_reported_once() -> None:
    """At once, and nothing more is sent."""
    connections = SessionConnections(lambda: False)
    client = Client(connections)
    await eventually(lambda: connections.count == 1, "it is open")
    client.left.set()
    await asyncio.wait_for(client.task, 1)
    assert (client.notified, connections.count) == (1, 0)
    assert [message.get("more_body") for message in client.sent] == [None, True]


async def test_a_stopping_server_ends_the_connection_and_reports_nothing() -> None:
    """The response ends in order; its client has not disconnected."""
    ending = False
    connections = SessionConnections(lambda: ending)
    client = Client(connections)
    await eventually(lambda: connections.count == 1, "it is open")
    ending = True
    await asyncio.wait_for(client.task, 2)
    assert client.notified == 0
    assert client.sent[-1] == {"type": "http.response.body", "body": b""}


async def test_a_session_connection_carries_a_byte_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no proxy in between closes it as idle."""
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    monkeypatch.setattr(module, "STOP_CHECK_S", 0.01)
    client = Client(SessionConnections(lambda: False))
    await eventually(lambda: len(client.sent) >= 4, "beats come")
    client.left.set()
    await client.task


async def test_their_number_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is refused with an error that says what to do."""
    monkeypatch.setattr(module, "_MAX_CONNECTIONS", 1)
    connections = SessionConnections(lambda: False)
    client = Client(connections)
    await eventually(lambda: connections.count == 1, "it is open")
    with pytest.raises(OverCapacity):
        Client(connections)
    client.left.set()
    await client.task
