"""Accepting from a listening socket that several processes share."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable

import pytest

from telemetry.http.connections import shared_accept
from telemetry.http.connections.shared_accept import SharedAcceptor
from telemetry.http.server import bind_socket
from tests.support.waiting import eventually


class Opened(asyncio.Protocol):
    """The protocols that were made, in ``all``; each knows whether it is connected."""

    def __init__(self, everyone: list[Opened]) -> None:
        everyone.append(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport


class Scene:
    def __init__(self, pause: Callable[[int], float]) -> None:
        self.listener = bind_socket("127.0.0.1", 0)
        self.address = self.listener.getsockname()
        self.opened: list[Opened] = []
        self.clients: list[socket.socket] = []
        self.acceptor = SharedAcceptor(self.listener, lambda: Opened(self.opened), lambda: len(self.opened), pause)

    def connect(self, count: int) -> None:
        for _ in range(count):
            self.clients.append(socket.create_connection(self.address))

    def close(self) -> None:
        self.acceptor.close()
        for client in self.clients:
            client.close()
        for one in self.opened:
            if hasattr(one, "transport"):
                one.transport.close()


async def test_it_asks_before_each_connection() -> None:
    """Of a burst, it takes one connection at a time and says how many it has, so that others get their part."""
    asked: list[int] = []

    def pause(own: int) -> float:
        asked.append(own)
        return 0.0

    scene = Scene(pause)
    scene.connect(5)
    await eventually(lambda: len(scene.opened) == 5, "all are accepted")
    assert len(asked) >= 5
    assert asked[0] == 0
    assert max(asked) >= 4
    scene.close()


async def test_a_connection_that_nobody_else_takes_is_taken_after_the_pause() -> None:
    """Whatever the others do, none waits for longer than a pause of its own."""
    scene = Scene(lambda _own: 0.02)
    scene.connect(3)
    await eventually(lambda: len(scene.opened) == 3, "all are accepted", limit_s=5)
    scene.close()


async def test_closing_while_it_waits_takes_nothing_more() -> None:
    """The port is free at once, and no timer accepts from a closed socket."""
    scene = Scene(lambda _own: 0.05)
    scene.connect(1)
    await asyncio.sleep(0.02)
    scene.acceptor.close()
    scene.acceptor.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(scene.address)
    await asyncio.sleep(0.1)
    assert scene.opened == []
    scene.close()


async def test_a_failed_accept_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without free file descriptors does not spin, and serves on once it has some."""
    monkeypatch.setattr(shared_accept, "RETRY_S", 0.05)
    scene = Scene(lambda _own: 0.0)
    calls = 0
    accept = scene.listener.accept

    class Failing:
        def __init__(self) -> None:
            self.fileno, self.close = scene.listener.fileno, scene.listener.close

        def accept(self) -> tuple[socket.socket, object]:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise OSError(errno.EMFILE, "Too many open files")
            return accept()

    monkeypatch.setattr(scene.acceptor, "_listener", Failing())
    scene.connect(1)
    await eventually(lambda: len(scene.opened) == 1, "it is accepted in the end", limit_s=5)
    assert calls <= 3
    scene.close()
