"""TCP connections of tests: who holds which, read from the kernel's tables; and a client that sends raw bytes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"


@dataclass(frozen=True, slots=True)
class Held:
    """The clients' ports of the connections that one process had accepted at one instant of ``time.monotonic()``."""

    at_s: float
    ports: frozenset[int]


@dataclass(frozen=True, slots=True)
class _Row:
    local_port: int
    peer_port: int
    listens: bool
    inode: str


def kill_holding(pid: int, port: int) -> Held:
    """SIGKILL ``pid``, and what it held of the server port ``port`` in that moment."""
    os.kill(pid, signal.SIGSTOP)  # from now on it accepts nothing more
    held = held_by(pid, port)
    os.kill(pid, signal.SIGKILL)
    return held


def held_by(pid: int, port: int) -> Held:
    """The connections to ``port`` that ``pid`` has accepted."""
    own = _inodes(pid)
    rows = [row for row in _rows() if row.local_port == port and not row.listens and row.inode in own]
    return Held(time.monotonic(), frozenset(row.peer_port for row in rows))


def listeners(pid: int) -> set[int]:
    """The ports on which ``pid`` listens."""
    own = _inodes(pid)
    return {row.local_port for row in _rows() if row.listens and row.inode in own}


def _rows() -> list[_Row]:
    rows = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            local, peer = (int(address.rpartition(":")[2], 16) for address in fields[1:3])
            rows.append(_Row(local, peer, fields[3] == _LISTEN, fields[9]))
    return rows


def _inodes(pid: int) -> set[str]:
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed while we look
            target = str(entry.readlink())
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found


@dataclass(slots=True)
class RawAnswer:
    """One answer as it came: status, headers (names in lower case) and the decoded body."""

    status: int
    headers: dict[str, str]
    body: bytes


class RawClient:
    """A client that sends whatever bytes a test likes, and reads answers as a strict HTTP/1.1 client does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit_s: float) -> None:
        self.reader = reader
        self.writer = writer
        self._limit_s = limit_s

    @classmethod
    @contextlib.asynccontextmanager
    async def to(
        cls, port: int, *, limit_s: float = 10.0, receive_buffer_bytes: int | None = None
    ) -> AsyncIterator[RawClient]:
        """A connection to ``port`` of this machine; each read ends within ``limit_s``."""
        sock = socket.socket()
        if receive_buffer_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=sock)
        try:
            yield cls(reader, writer, limit_s)
        finally:
            writer.transport.abort()

    def reset(self) -> None:
        """End the connection with a RST, as a process that dies with unread bytes does."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def send_for_ever(self, piece: bytes, limit_bytes: int, pause_s: float = 0.0) -> int:
        """Send ``piece`` again and again until the server ends the connection; how many bytes went out. Gives up with
        ``AssertionError`` at ``limit_bytes``."""
        sent = 0
        try:
            while not self.reader.at_eof():
                assert sent < limit_bytes, "the server took it all"
                async with asyncio.timeout(self._limit_s):
                    await self.send(piece)
                sent += len(piece)
                await asyncio.sleep(pause_s)
        except ConnectionError:
            pass
        return sent

    async def answer_to_trickle(self, piece: bytes, *, pause_s: float) -> RawAnswer:
        """The answer that comes while ``piece`` is sent again and again."""
        answering = asyncio.ensure_future(self.answer())
        while not answering.done():
            self.writer.write(piece)
            await asyncio.sleep(pause_s)
        return await answering

    async def answer(self, *, head: bool = False) -> RawAnswer:
        """The next answer; ``head``: one without a body, whatever its length says. Interim answers are skipped."""
        async with asyncio.timeout(self._limit_s):
            while True:
                lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                version, status, *_ = lines[0].split(" ")
                assert version == "HTTP/1.1", lines[0]
                if int(status) >= 200:
                    break
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:-2])}
            bodyless = head or int(status) in (204, 304)
            return RawAnswer(int(status), headers, b"" if bodyless else await self._body(headers))

    async def ended(self) -> bytes:
        """What comes until the server ends the connection, by whatever means."""
        rest = bytearray()
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(self._limit_s):
                while piece := await self.reader.read(65_536):
                    rest += piece
        return bytes(rest)

    async def _body(self, headers: dict[str, str]) -> bytes:
        if "content-length" in headers:
            return await self.reader.readexactly(int(headers["content-length"]))
        if headers.get("transfer-encoding") != "chunked":
            return await self.reader.read()
        body = b""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            body += await self.reader.readexactly(size)
            assert await self.reader.readexactly(2) == b"\r\n"
        assert await self.reader.readexactly(2) == b"\r\n"
        return body
