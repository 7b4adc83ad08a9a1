"""The contract suite runs on fakeredis, on Valkey 9 and on Redis 7.0: the same promises on each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from broker import Broker
from queue_schemas import Frame, Marker, MarkerKind, SessionId, new_session_id
from queue_schemas.frames import unpack_frames, unpack_marker
from queue_schemas.keys import ShardKeys
from tests.support.queue import Backend, FakeBackend, Puller, ServerBackend

BACKENDS = ("fakeredis", "valkey", "redis7")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """An empty queue server of each kind."""
    if request.param == "fakeredis":
        return FakeBackend()
    return ServerBackend(request.getfixturevalue(request.param), request.param)


@pytest.fixture(params=BACKENDS[1:])
def real_backend(request: pytest.FixtureRequest) -> ServerBackend:
    """An empty real server of each kind."""
    return ServerBackend(request.getfixturevalue(request.param), request.param)


Connect = Callable[..., Awaitable[Broker]]


@pytest.fixture
async def connect(backend: Backend) -> AsyncIterator[Connect]:
    """Connects more brokers to the same server: other processes."""
    brokers: list[Broker] = []

    async def another(**options: Any) -> Broker:
        brokers.append(await backend.connect(**options))
        return brokers[-1]

    yield another
    for broker in brokers:
        await broker.close()


@pytest.fixture
async def broker(connect: Connect) -> Broker:
    """A broker on the empty server."""
    return await connect()


@pytest.fixture
async def client(backend: Backend) -> AsyncIterator[Any]:
    """A raw client on the same server, to look at what the scripts left."""
    client = backend.client()
    yield client
    await client.aclose()


@pytest.fixture
async def worker(broker: Broker) -> Puller:
    """A worker that has joined."""
    return await Puller(broker).join()


class Listener:
    """The reply stream of a Router, read by hand."""

    def __init__(self, client: Any) -> None:
        self.router: SessionId = new_session_id("router")
        self._client = client
        self._key = ShardKeys(0).reply(self.router)
        self._last: Any = "0"

    async def open(self) -> Listener:
        """Make the stream, as the Router does."""
        self._last = await self._client.xadd(self._key, {"o": "open"})
        return self

    async def leave(self) -> None:
        """The Router is gone and its stream has expired."""
        await self._client.delete(self._key)

    async def received(self) -> list[Frame | Marker]:
        """What came since the last call."""
        entries = await self._client.xrange(self._key, min=b"(" + self._last)
        found: list[Frame | Marker] = []
        for self._last, fields in entries:
            if b"f" in fields:
                found += unpack_frames(fields[b"f"])
            else:
                found.append(unpack_marker(fields[b"m"]))
        return found

    async def marker(self) -> Marker:
        """The one marker that came."""
        (marker,) = await self.received()
        assert isinstance(marker, Marker)
        return marker

    async def expect_marker(self, kind: MarkerKind) -> None:
        """Exactly one marker of this kind has come since the last call."""
        assert (await self.marker()).kind is kind


@pytest.fixture
async def listener(client: Any) -> Listener:
    """A Router that listens."""
    return await Listener(client).open()
