"""The link of one Router process to its parent: takes the parent's orders, and gets the metrics of all processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket

from queue_schemas import InferqError
from telemetry import MetricsRegistry, get_logger
from telemetry.signals import leave_terminal

from .merged_metrics import Snapshot, take_snapshot
from .messages import Kind, MessageReader, pack

SCRAPE_TIMEOUT_S = 3.0
"""Longer than the parent waits for the other processes."""
LAST_SEND_S = 1.0
EXIT_PARENT_LOST = 1
_READ_BYTES = 1 << 16

log = get_logger("router.processes")


class SiblingLink:
    """``number`` counts the processes from 1; a process that is started again has its predecessor's."""

    def __init__(self, number: int, channel: socket.socket) -> None:
        self.number = number
        self._channel = channel
        self._spare = channel.dup()
        """Not closed with the loop."""
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter
        self._merged: asyncio.Future[Snapshot] | None = None

    async def open(self) -> None:
        """Connect this process's loop to the channel: before everything else."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._channel)

    async def run(self, registry: MetricsRegistry, stop: asyncio.Event, hurry: asyncio.Event) -> None:
        """Carry out the parent's orders until cancelled: set ``stop`` and ``hurry``, report the metrics of
        ``registry``. A killed parent is a killed Router: without it, end the process at once. Nobody would start it
        again, and it holds the port.

        Signals are the parent's business: a terminal or a service manager sends them to all processes.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        messages = MessageReader()
        try:
            while data := await self._read():
                for kind, values in messages.feed(data):
                    self._obey(kind, values, registry, stop, hurry)
            log.error("parent_lost", number=self.number)
            os._exit(EXIT_PARENT_LOST)
        finally:
            # The last figures: what this process counted outlives it.
            self._send(Kind.FIGURES, take_snapshot(registry))
            self._writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(LAST_SEND_S):
                    await self._writer.wait_closed()

    def refuse(self, sentence: str) -> None:
        """Tell the parent why this process cannot start, once its loop has ended."""
        with contextlib.suppress(OSError):
            self._spare.sendall(pack(Kind.REFUSED, sentence))

    def ready(self) -> None:
        """Tell the parent that this process accepts connections."""
        log.info("accepting", number=self.number, pid=os.getpid())
        self._send(Kind.READY)

    async def merged(self, registry: MetricsRegistry) -> Snapshot:
        """The metrics of all processes; ``registry`` has those of this one. Raises ``InferqError`` if the parent does
        not answer in time: a page that shows a part as the whole would be wrong."""
        if self._merged is None:
            self._merged = asyncio.get_running_loop().create_future()
            self._send(Kind.SCRAPE, take_snapshot(registry))
        answer = self._merged
        try:
            async with asyncio.timeout(SCRAPE_TIMEOUT_S):
                return await asyncio.shield(answer)
        except TimeoutError:
            if self._merged is answer:
                self._merged = None
            raise InferqError("the metrics of the other processes of this router did not come: ask again") from None

    async def _read(self) -> bytes:
        try:
            return await self._reader.read(_READ_BYTES)
        except ConnectionError:
            return b""

    def _obey(
        self, kind: Kind, values: list[Snapshot], registry: MetricsRegistry, stop: asyncio.Event, hurry: asyncio.Event
    ) -> None:
        match kind:
            case Kind.STOP:
                stop.set()
            case Kind.HANGUP:
                leave_terminal()
            case Kind.HURRY:
                hurry.set()
            case Kind.COLLECT:
                self._send(Kind.FIGURES, take_snapshot(registry))
            case Kind.MERGED:
                answer, self._merged = self._merged, None
                if answer is not None:
                    answer.set_result(values[0])
            case _:
                raise ValueError(f"a process of the router got a message that is for its parent: {kind}")

    def _send(self, kind: Kind, *values: Snapshot) -> None:
        if not self._writer.is_closing():
            self._writer.write(pack(kind, *values))
