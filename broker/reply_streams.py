"""Blocking reads: a Router's replies and a worker's control messages, each on a connection of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from queue_schemas import BadMessage, Control, Frame, InferqError, Marker, ShardKeys, parse_control
from queue_schemas.frames import FRAME_FIELD, MARKER_FIELD, unpack_frames, unpack_marker
from telemetry import get_logger

from .redis.calls import Caller, as_inferq_error
from .redis.failures import FAILURES
from .redis.server_checks import read_run_id

REPLY_TTL_MS = 60_000
_TEND_EVERY_S = 10.0
_TRIM_AFTER_BYTES = 4 << 20
_READ_COUNT = 256
_ENTRY_BYTES = 64
_BLOCK_MS = 5_000
_MAX_PAUSE_S = 1.0

log = get_logger(__name__)

Entries = list[tuple[str, dict[bytes, bytes]]]


class ReplyReader:
    """Reads the reply stream of one Router on one shard until cancelled, and keeps it alive and short."""

    def __init__(
        self,
        caller: Caller,
        keys: ShardKeys,
        router: str,
        deliver: Callable[[list[Frame | Marker]], None],
        opened: Callable[[bool], None],
    ) -> None:
        self._caller = caller
        self._keys = keys
        self._router = router
        self._key = keys.reply(router)
        self._deliver = deliver
        self._opened = opened
        self._last = "0"
        self._read_since_trim = 0
        self._run_id = ""
        self._doubtful = False
        """What was in the stream may be lost, and nobody was told yet."""
        self._count = _READ_COUNT

    async def run(self) -> None:
        """Read for ever. ``opened(first)`` is called when the stream was made for the ``first`` time, and whenever what
        was in it may be lost: it had to be made again, or the server is another run of itself."""
        pause = 0.05
        first = True
        tend_at = 0.0
        while True:
            try:
                if time.monotonic() >= tend_at:
                    await self._look_at_run()
                    await self._tend()
                    if self._doubtful:
                        self._doubtful = False
                        self._opened(first)
                        first = False
                    tend_at = time.monotonic() + _TEND_EVERY_S
                entries = await read_stream(self._caller, self._key, self._last, self._count, _BLOCK_MS)
                pause = 0.05
                self._count = _READ_COUNT
            except InferqError as error:
                log.warning("reply_stream_unreachable", error=error.message)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _MAX_PAUSE_S)
                tend_at = 0.0
                # Perhaps the reply was too large for the time it may take.
                self._count = max(1, self._count // 2)
                continue
            if entries:
                self._last = entries[-1][0]
                self._deliver([item for entry_id, fields in entries for item in parse_reply(entry_id, fields)])
                self._read_since_trim += sum(_ENTRY_BYTES + len(fields.get(FRAME_FIELD, b"")) for _, fields in entries)
                if self._read_since_trim >= _TRIM_AFTER_BYTES:
                    tend_at = 0.0

    async def _tend(self) -> None:
        """Extend the stream's life and drop what was read; make it if it is not there."""
        self._read_since_trim = 0
        if await tend(self._caller, self._keys, self._router, REPLY_TTL_MS, self._last):
            self._doubtful = True

    async def _look_at_run(self) -> None:
        """Whether the server was restarted or replaced since we looked last, and may have lost its latest writes."""
        run_id, before = await read_run_id(self._caller, self._key), self._run_id
        self._run_id = run_id or before
        if before and run_id and run_id != before:
            self._doubtful = True
            await self._go_on()

    async def _go_on(self) -> None:
        """What comes must stand behind what was read, though its entry may have been lost, and clocks differ."""
        # Trimming keeps the last entry read: none from it on, none is left from it.
        if self._last != "0" and not await self._caller.command(
            self._key, "XRANGE", self._key, self._last, "+", "COUNT", 1
        ):
            # Once only: an entry that came meanwhile stands behind already, and then this one is refused.
            await self._caller.once(self._key, "XADD", self._key, "NOMKSTREAM", self._last, "o", "open")


async def tend(caller: Caller, keys: ShardKeys, reader: str, ttl_ms: int, read_to: str = "0") -> bool:
    """Keep a reply stream for ``ttl_ms`` of the queue's time, without the entries before ``read_to``: whether
    it had to
    be made."""
    return bool(await caller.script("tend", keys.budget, keys.prefix, reader, ttl_ms, read_to))


def parse_reply(entry_id: str, fields: dict[bytes, bytes]) -> list[Frame | Marker]:
    """The news in one entry of a reply stream; what is malformed is logged, and none."""
    try:
        if FRAME_FIELD in fields:
            return list(unpack_frames(fields[FRAME_FIELD]))
        if MARKER_FIELD in fields:
            return [unpack_marker(fields[MARKER_FIELD])]
    except BadMessage as error:
        log.warning("reply_entry_malformed", entry=entry_id, error=error.message)
    return []


async def read_control(
    caller: Caller, keys: ShardKeys, session_id: str, after: str, block_ms: int
) -> list[tuple[str, Control | None]]:
    """Control messages behind ``after`` with their ids; None stands for a kind this version does not know."""
    entries = await read_stream(caller, keys.control(session_id), after, _READ_COUNT, block_ms)
    messages: list[tuple[str, Control | None]] = []
    for entry_id, fields in entries:
        try:
            messages.append((entry_id, parse_control(fields)))
        except BadMessage as error:
            log.warning("control_entry_malformed", entry=entry_id, error=error.message)
            messages.append((entry_id, None))
    return messages


async def read_stream(
    caller: Caller, key: str, after: str, count: int, block_ms: int, *, connection_of: str = ""
) -> Entries:
    """Entries of one stream behind ``after``, waiting up to ``block_ms`` for the first. Raises like a call, once. Each
    stream has a connection of its own, unless it shares that of ``connection_of``, another key of its shard."""
    caller.round_trips += 1
    try:
        reply: Any = await caller.link.blocking(
            connection_of or key,
            block_ms / 1000,
            "XREAD",
            "COUNT",
            count,
            "BLOCK",
            max(block_ms, 1),
            "STREAMS",
            key,
            after,
        )
    except FAILURES as error:
        raise as_inferq_error(error) from error
    if not reply:
        return []
    streams = list(reply.values()) if isinstance(reply, dict) else [entries for _, entries in reply]
    return [(_id(entry[0]), _fields(entry[1])) for entry in _flat(streams[0])]


def _flat(entries: Any) -> Any:
    """redis-py wraps a stream's entries once more under some protocols."""
    return (
        entries[0] if entries and isinstance(entries[0], list) and isinstance(entries[0][0], (list, tuple)) else entries
    )


def _id(raw: Any) -> str:
    return raw.decode() if isinstance(raw, bytes) else str(raw)


def _fields(raw: Any) -> dict[bytes, bytes]:
    if isinstance(raw, dict):
        return raw
    return dict(zip(raw[::2], raw[1::2], strict=True))
