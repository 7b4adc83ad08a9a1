"""Faults on the wire: a TCP proxy on loopback that loses replies, delays, cuts and stalls connections on request."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Self

from broker.redis.server_checks import CONTRACT

_CHUNK = 65_536
_NARROW_CHUNK = 1_500


class Point(StrEnum):
    """A moment in the life of a request."""

    BEFORE_SEND = "before send"
    AFTER_COMMIT = "after commit, before the reply"
    AFTER_REPLY = "after the reply"


@dataclass(frozen=True, slots=True)
class InjectedFault:
    """What happens to whoever sends a request with ``marker`` in it, and when."""

    marker: bytes
    point: Point
    action: Callable[[], None]


class FaultProxy:
    """Stands between a client and ``target_port``; use it as ``async with FaultProxy(server.port) as proxy``."""

    def __init__(self, target_port: int, *, buffer_bytes: int = 0) -> None:
        """``buffer_bytes``: about how much of what clients send lies in the proxy at most; 0: megabytes."""
        self._buffer_bytes = buffer_bytes
        self.port = 0
        self.latency_s = 0.0
        """Delay of every chunk, in each direction."""
        self.slice_bytes = 0
        """Pass chunks on in pieces of so many bytes; 0: as they come."""
        self.bytes_per_s = 0.0
        """What all connections together may carry in each direction; 0: no limit."""
        self._free_at = {True: 0.0, False: 0.0}
        self.replies_lost = 0
        self.seen: Counter[bytes] = Counter()
        """How often the server said each word of ``watch_for``."""
        self.watch_for: tuple[bytes, ...] = ()
        self._fault: InjectedFault | None = None
        self._target_port = target_port
        self._losses: dict[bytes, int] = {}
        self._refusing = False
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        """A Redis URL that leads through the proxy."""
        return f"redis://127.0.0.1:{self.port}/0"

    async def __aenter__(self) -> Self:
        listener = socket.socket()
        if self._buffer_bytes:  # accepted sockets inherit it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer_bytes)
        listener.bind(("127.0.0.1", 0))
        limit = self._buffer_bytes or _CHUNK
        self._server = await asyncio.start_server(self._accept, sock=listener, limit=limit)
        self.port = listener.getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def lead_to(self, port: int) -> None:
        """New connections go to another server, as when a name is given a new address; the others stay."""
        self._target_port = port

    def lose_reply(self, marker: bytes, times: int = 1) -> None:
        """Of the next ``times`` requests that contain ``marker``: let the server execute them, then drop the
        connection instead of its reply."""
        self._losses[marker] = times

    def keep_replies(self) -> None:
        """End :meth:`lose_reply`."""
        self._losses.clear()

    def loses(self, marker: bytes) -> bool:
        """Whether a reply that :meth:`lose_reply` asked for is still to be lost."""
        return marker in self._losses

    def inject(self, fault: InjectedFault | None) -> None:
        """At the next request that contains its marker, call its action at its point. None: not any more."""
        self._fault = fault

    def cut(self) -> None:
        """Drop all connections and refuse new ones, until :meth:`heal`."""
        self._refusing = True
        for writer in self._writers:
            writer.transport.abort()

    def silence(self) -> None:
        """Keep connections open and accept new ones, but pass nothing on, until :meth:`heal`."""
        self._flowing.clear()

    def heal(self) -> None:
        """End :meth:`cut` and :meth:`silence`."""
        self._refusing = False
        self._flowing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # an end of either side is an end of both, and so is that of the proxy
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            return
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        link = _Link()
        self._writers |= {writer, server_writer}
        try:
            async with asyncio.TaskGroup() as group:
                up = group.create_task(self._pump(reader, server_writer, link, upward=True))
                down = group.create_task(self._pump(server_reader, writer, link, upward=False))
                await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
                up.cancel()
                down.cancel()
        except* OSError:
            pass
        finally:
            self._writers -= {writer, server_writer}
            server_writer.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: _Link, *, upward: bool
    ) -> None:
        while chunk := await reader.read(_NARROW_CHUNK if self.bytes_per_s else _CHUNK):
            if self.latency_s:
                await asyncio.sleep(self.latency_s)
            await self._flowing.wait()
            if self.bytes_per_s:
                await self._carried(len(chunk), upward=upward)
            if upward and self._losses:
                link.doomed = next((marker for marker in self._losses if marker in link.tail + chunk), link.doomed)
            if upward and self._fault is not None and self._fault.marker in link.tail + chunk:
                link.fault, self._fault = self._fault, None
                if link.fault.point is Point.BEFORE_SEND:
                    link.fault.action()
                    return
            if upward:
                link.tail = chunk[-64:]
            elif link.doomed and not chunk.startswith(b"-NOSCRIPT"):
                self._count_lost(link.doomed)
                return
            elif link.fault is not None and link.fault.point is Point.AFTER_COMMIT:
                link.fault.action()
                return
            if not upward:
                self._watch(link, chunk)
            await self._write(writer, chunk)
            if not upward and link.fault is not None:
                link.fault.action()
                return

    async def _carried(self, size: int, *, upward: bool) -> None:
        """Until a narrow link has carried so many bytes, behind what others sent before."""
        now = asyncio.get_running_loop().time()
        self._free_at[upward] = max(self._free_at[upward], now) + size / self.bytes_per_s
        await asyncio.sleep(self._free_at[upward] - now)

    def _count_lost(self, marker: bytes) -> None:
        self.replies_lost += 1
        left = self._losses.get(marker, 0) - 1
        if left > 0:
            self._losses[marker] = left
        else:
            self._losses.pop(marker, None)

    def _watch(self, link: _Link, chunk: bytes) -> None:
        for word in self.watch_for:
            # What is left of the last chunk is too short to have the word in it already.
            self.seen[word] += (link.heard[-(len(word) - 1) :] + chunk).count(word)
        link.heard = (link.heard + chunk)[-64:]

    async def _write(self, writer: asyncio.StreamWriter, chunk: bytes) -> None:
        size = self.slice_bytes or len(chunk)
        for at in range(0, len(chunk), size):
            writer.write(chunk[at : at + size])
            with contextlib.suppress(ConnectionError):
                await writer.drain()
            if self.slice_bytes:
                await asyncio.sleep(0)


class _Link:
    """What the proxy remembers of one connection."""

    def __init__(self) -> None:
        self.doomed = b""
        self.heard = b""
        self.fault: InjectedFault | None = None
        self.tail = b""


class ScriptedRedis:
    """A Redis that is none: answers ``INFO`` with the given text and everything else politely, for start-up checks."""

    def __init__(self, info: str) -> None:
        self._info = info
        self._server: asyncio.Server | None = None
        self.url = ""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                count = int((await reader.readuntil(b"\r\n"))[1:])
                command = []
                for _ in range(count):
                    size = int((await reader.readuntil(b"\r\n"))[1:])
                    command.append((await reader.readexactly(size + 2))[:-2].decode())
                writer.write(self._answer(command))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client is done
        finally:
            writer.close()

    def _answer(self, command: list[str]) -> bytes:
        info = self._info.encode()
        answers = {
            "INFO": b"$%d\r\n%s\r\n" % (len(info), info),
            "PING": b"+PONG\r\n",
            "TIME": b"*2\r\n$10\r\n1700000000\r\n$1\r\n0\r\n",
            "CONFIG": b"*0\r\n",
            "HGET": b"$1\r\n%s\r\n" % (CONTRACT.encode() if command[-1] == "contract" else b"1"),
            "HSETNX": b":1\r\n",
        }
        return answers.get(command[0].upper(), b"+OK\r\n")
