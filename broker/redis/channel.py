"""One open connection to Redis: an asyncio protocol over hiredis, for :mod:`broker.redis.multiplexer`.

No task, no time-out and no system call of its own is spent on a command: those of one turn of the event loop go out in
one write, replies reach their callers from the callback that read them, and one timer watches all commands.
"""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from collections import deque
from collections.abc import Callable
from typing import Any

import hiredis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, MasterDownError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

BECAME_REPLICA = (ReadOnlyError, MasterDownError)
"""What a server answers that is no primary any more."""
MAX_UNSENT_BYTES = 4 << 20
"""Callers wait to send while this much waits to be written."""
LEAST_BYTES_PER_S = 16 << 10
"""What a connection must move for a reply that takes longer than its limit."""
LONGEST_S = 600.0
"""How much longer than its limit a reply may take while bytes move."""

_PIECE_BYTES = 64 << 10
_TURN_BYTES = 512 << 10
"""What is written in one turn of the event loop, so that other work gets its turn beside a large command."""
_WATCH_EVERY_S = 0.5
_SECOND_LOOK_S = 0.05
_NOT_YET = object()
_PUSH: Any = getattr(hiredis, "PushNotification", ())
"""hiredis has it since 3.2: what a server says under RESP3 without being asked."""


class Channel(asyncio.Protocol):
    """A connection in use, until ``on_lost`` is called with the error and whether no command was under way.

    ``writer`` is redis-py's, whose transport gets this protocol. ``parse_error`` makes an exception of an error reply.
    """

    def __init__(
        self,
        writer: asyncio.StreamWriter,
        parse_error: Callable[[str], Exception],
        on_lost: Callable[[Exception, bool], None],
    ) -> None:
        self.is_full = False
        self.room = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._on_lost = on_lost
        self._writer = writer  # it would close the transport when it is deleted
        self._transport = writer.transport
        self._reader = hiredis.Reader(protocolError=InvalidResponse, replyError=parse_error, notEnoughData=_NOT_YET)
        self._awaited: deque[tuple[float, asyncio.Future[Any]]] = deque()
        self._loss: Exception | None = None
        self._unsent: deque[bytes | memoryview] = deque()
        self._unsent_bytes = 0
        self._will_flush = False
        self._paused = False
        self._watch: asyncio.TimerHandle | None = None
        self._progress = _Progress(writer.transport)
        self._transport.set_write_buffer_limits(high=_PIECE_BYTES)
        self._transport.set_protocol(self)

    def send(self, limit_s: float, packed: bytes) -> asyncio.Future[Any]:
        """Send a command; its reply is the future's result. It goes out at once if none is under way, else with what is
        sent in this turn of the event loop."""
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._loss is not None:  # by the write of the command before, of the same pipeline
            future.set_exception(self._loss)
            return future
        is_lone = not self._awaited
        self._awaited.append((limit_s, future))
        self._unsent.append(packed)
        self._unsent_bytes += len(packed)
        if self._unsent_bytes >= MAX_UNSENT_BYTES:
            self.is_full = True
            self.room.clear()
        if self._watch is None:
            self._progress.begin(future, self._loop.time())
            self._watch = self._loop.call_later(_WATCH_EVERY_S, self._look_for_silence)
        if is_lone:
            self._flush()
        elif not self._will_flush:
            self._will_flush = True
            self._loop.call_soon(self._flush)
        return future

    def data_received(self, data: bytes) -> None:
        """Hand replies to those who await them."""
        self._progress.received += len(data)
        awaited, gets = self._awaited, self._reader.gets
        try:
            self._reader.feed(data)
            while (reply := gets()) is not _NOT_YET:
                if isinstance(reply, _PUSH):
                    continue
                is_error = isinstance(reply, Exception)
                if is_error and not isinstance(reply, ResponseError):
                    raise reply  # it concerns the connection, as when the server is loading
                _, future = awaited.popleft()
                if not future.done():
                    if is_error:
                        future.set_exception(reply)
                    else:
                        future.set_result(reply)
                if is_error and isinstance(reply, BECAME_REPLICA):
                    # It keeps its connections, while its name may lead to the new primary by now.
                    self.lose(RedisConnectionError("the server became a replica"))
                    return
        except RedisError as error:  # also what is no reply at all
            self.lose(error)
        except IndexError:
            self.lose(RedisConnectionError("the server sent a reply that nobody asked for"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what is under way."""
        self.lose(
            RedisConnectionError(f"the connection was lost: {exc}" if exc else "the server closed the connection")
        )
        if not self.closed.done():
            self.closed.set_result(None)

    def pause_writing(self) -> None:
        """Hold commands back: the peer does not take them as fast."""
        self._paused = True

    def resume_writing(self) -> None:
        """Go on writing."""
        self._paused = False
        if self._unsent and not self._will_flush:
            self._will_flush = True
            self._loop.call_soon(self._flush)

    def lose(self, error: Exception) -> None:
        """Fail what is under way with ``error``, and drop what was not sent yet: closing alone would deliver it later,
        when its commands have long been repeated."""
        if self._loss is not None:
            return
        self._loss = error
        lost = [future for _, future in self._awaited]
        self._awaited.clear()
        self._unsent.clear()
        for future in lost:
            if not future.done():
                future.set_exception(error)
        if self._watch is not None:
            self._watch.cancel()
        self.is_full = False
        self.room.set()
        self._on_lost(error, not lost)
        self._transport.abort()

    def _flush(self) -> None:
        self._will_flush = False
        left = _TURN_BYTES
        try:
            while self._unsent and not self._paused and left > 0:
                piece = self._next_piece()
                left -= len(piece)
                self._transport.write(piece)
        except RuntimeError as error:  # what uvloop raises when the peer has closed, before the protocol is told so
            self.lose(RedisConnectionError(f"the connection was closed: {error}"))
            return
        self._unsent_bytes -= _TURN_BYTES - left
        self._progress.written += _TURN_BYTES - left
        if self.is_full and self._unsent_bytes < MAX_UNSENT_BYTES:
            self.is_full = False
            self.room.set()
        if self._unsent and not self._paused:
            self._will_flush = True
            self._loop.call_soon(self._flush)

    def _next_piece(self) -> bytes | memoryview:
        """The next commands that are small together, or a part of a large one."""
        unsent = self._unsent
        first = unsent.popleft()
        if len(first) > _PIECE_BYTES:
            whole = memoryview(first)
            unsent.appendleft(whole[_PIECE_BYTES:])
            return whole[:_PIECE_BYTES]
        if not unsent:
            return first
        pieces, size = [first], len(first)
        while unsent and size + len(unsent[0]) <= _PIECE_BYTES:
            size += len(unsent[0])
            pieces.append(unsent.popleft())
        return b"".join(pieces)

    def _look_for_silence(self) -> None:
        """One timer watches all commands, by the first that is not answered."""
        self._watch = None
        progress = self._progress
        if not self._awaited:
            progress.head = None
            return
        limit_s, head = self._awaited[0]
        again_s = progress.look(head, limit_s, self._loop.time())
        if again_s is None:
            self.lose(RedisTimeoutError("Redis did not answer in time"))
        else:
            self._watch = self._loop.call_later(again_s, self._look_for_silence)


class _Progress:
    """What has moved on a connection since the first unanswered command became the first."""

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport
        self.head: asyncio.Future[Any] | None = None
        self.received = 0
        self.written = 0
        self._since = 0.0
        self._moved_at = 0.0
        self._moved_before = 0
        self._moved = 0
        self._is_suspect = False

    def begin(self, head: asyncio.Future[Any], now: float) -> None:
        """``head`` is the first command now."""
        self.head = head
        self._since = self._moved_at = now
        self._moved = self._moved_before = self._bytes_moved()
        self._is_suspect = False

    def look(self, head: asyncio.Future[Any], limit_s: float, now: float) -> float | None:
        """In how many seconds to look again; None if the reply to ``head`` is overdue."""
        if head is not self.head:
            self.begin(head, now)
            return _WATCH_EVERY_S
        moved = self._bytes_moved()
        if moved > self._moved:
            self._moved, self._moved_at = moved, now
        more_s = min((self._moved - self._moved_before) / LEAST_BYTES_PER_S, LONGEST_S)
        if now - self._moved_at <= limit_s and now - self._since <= limit_s + more_s:
            self._is_suspect = False
            return _WATCH_EVERY_S
        if self._is_suspect:
            return None
        # Were this process held up, the reply may be at hand: it is read before the second look.
        self._is_suspect = True
        return _SECOND_LOOK_S

    def _bytes_moved(self) -> int:
        """Bytes that came and bytes that the peer's host has taken, as far as this system tells."""
        return self.received + self.written - self._transport.get_write_buffer_size() - _unacknowledged(self._transport)


def _unacknowledged(transport: asyncio.WriteTransport) -> int:
    """Bytes that the kernel holds for the peer: megabytes of a large command, which take long on a slow link."""
    try:
        held = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except (OSError, AttributeError):  # closed, or a system that does not say
        return 0
    return int(struct.unpack("i", held)[0])
