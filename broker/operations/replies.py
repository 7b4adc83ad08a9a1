"""Read a Router's reply streams, one per shard, and keep them alive and short while it does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

from queue_schemas import BadMessage, Frame, InferqError, Marker, SessionId, ShardKeys
from queue_schemas.frames import FRAME_FIELD, MARKER_FIELD, unpack_frames, unpack_marker
from telemetry import get_logger
from telemetry.backoff import Backoff

from ..redis.calls import Caller
from ..redis.server_checks import read_run_id
from ..redis.streams import read_stream

REPLY_TTL_MS = 60_000
START_TIMEOUT_S = 5.0
"""How long a Router that starts waits for shards that do not answer."""
_EXTEND_EVERY_S = 10.0
_TRIM_AFTER_BYTES = 4 << 20
_READ_COUNT = 256
_ENTRY_BYTES = 64
_BLOCK_MS = 5_000
_BACKOFF = Backoff(0.05, 1.0)

log = get_logger(__name__)


class Replies:
    """The reply streams of one Router, or of none yet."""

    def __init__(self, caller: Caller, keys: Sequence[ShardKeys]) -> None:
        self._caller = caller
        self._keys = keys
        self.ready = asyncio.Event()
        """Set once this Router's reply streams exist; only then may it enqueue."""
        self.missing: set[int] = set()
        """Shards on which this Router's reply stream does not exist yet."""

    async def read(
        self,
        router: SessionId,
        deliver: Callable[[list[Frame | Marker]], None],
        lost: Callable[[int], None] | None = None,
    ) -> NoReturn:
        """Read this Router's reply streams until cancelled; ``deliver`` gets frames and markers, in order per job.

        ``lost(shard)`` is called when the stream of a shard had to be made again, or its server was restarted: jobs of
        that shard, or their answers, may be missing. Malformed entries are logged and skipped.
        """

        def opened(shard: int) -> Callable[[bool], None]:
            def report(first: bool) -> None:
                if first:
                    self.missing.discard(shard)
                    if not self.missing:
                        self.ready.set()
                elif lost is not None:
                    lost(shard)

            return report

        async def serve_without_missing() -> None:
            """A shard that is away keeps no Router from serving the others."""
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(START_TIMEOUT_S):
                        await self.ready.wait()
                    return
                if len(self.missing) == len(self._keys):
                    continue
                log.warning("reply_streams_missing", shards=sorted(self.missing), then="the other shards are served")
                self.ready.set()
                return

        self.missing = set(range(len(self._keys)))
        async with asyncio.TaskGroup() as group:
            group.create_task(serve_without_missing())
            for keys in self._keys:
                group.create_task(ReplyReader(self._caller, keys, router, deliver, opened(keys.shard)).run())
        raise AssertionError("reply readers run until cancelled")


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
        self._may_have_lost = False
        """Entries of the stream may be lost, and ``opened`` was not called yet."""
        self._count = _READ_COUNT

    async def run(self) -> None:
        """Read until cancelled. ``opened(first)`` is called when the stream was made for the ``first`` time, and
        whenever entries may be lost: the stream had to be made again, or the server was restarted."""
        failures = 0
        first = True
        extend_at = 0.0
        while True:
            try:
                if time.monotonic() >= extend_at:
                    await self._check_server_run()
                    await self._extend()
                    if self._may_have_lost:
                        self._may_have_lost = False
                        self._opened(first)
                        first = False
                    extend_at = time.monotonic() + _EXTEND_EVERY_S
                entries = await read_stream(self._caller, self._key, self._last, self._count, _BLOCK_MS)
                failures = 0
                self._count = _READ_COUNT
            except InferqError as error:
                log.warning("reply_stream_unreachable", error=error.message)
                failures += 1
                await asyncio.sleep(_BACKOFF.pause_s(failures))
                extend_at = 0.0
                # Perhaps the reply was too large for the time it may take.
                self._count = max(1, self._count // 2)
                continue
            if entries:
                self._last = entries[-1][0]
                self._deliver([item for entry_id, fields in entries for item in parse_reply(entry_id, fields)])
                self._read_since_trim += sum(_ENTRY_BYTES + len(fields.get(FRAME_FIELD, b"")) for _, fields in entries)
                if self._read_since_trim >= _TRIM_AFTER_BYTES:
                    extend_at = 0.0

    async def _extend(self) -> None:
        """Extend the stream's life and drop what was read; make it if it is not there."""
        self._read_since_trim = 0
        if await extend_reply_stream(self._caller, self._keys, self._router, REPLY_TTL_MS, self._last):
            self._may_have_lost = True

    async def _check_server_run(self) -> None:
        """Notice that the server was restarted or replaced since the last call, and may have lost its latest writes."""
        run_id, before = await read_run_id(self._caller, self._key), self._run_id
        self._run_id = run_id or before
        if before and run_id and run_id != before:
            self._may_have_lost = True
            await self._continue_ids()

    async def _continue_ids(self) -> None:
        """Make new entries get ids after those already read, though the last one may be lost and the clock behind."""
        # Trimming keeps the last entry read: none from it on, none is left from it.
        if self._last != "0" and not await self._caller.command(
            self._key, "XRANGE", self._key, self._last, "+", "COUNT", 1
        ):
            # Once only: an entry that came meanwhile stands behind already, and then this one is refused.
            await self._caller.once(self._key, "XADD", self._key, "NOMKSTREAM", self._last, "o", "open")


async def extend_reply_stream(caller: Caller, keys: ShardKeys, reader: str, ttl_ms: int, read_to: str = "0") -> bool:
    """Keep a reply stream for ``ttl_ms`` of the queue's time, without the entries before ``read_to``: whether it
    had to be made."""
    return bool(await caller.script("keep_reply_stream", keys.budget, keys.prefix, reader, ttl_ms, read_to))


def parse_reply(entry_id: str, fields: dict[bytes, bytes]) -> list[Frame | Marker]:
    """The frames or marker in one entry of a reply stream; a malformed entry is logged and has none."""
    try:
        if FRAME_FIELD in fields:
            return list(unpack_frames(fields[FRAME_FIELD]))
        if MARKER_FIELD in fields:
            return [unpack_marker(fields[MARKER_FIELD])]
    except BadMessage as error:
        log.warning("reply_entry_malformed", entry=entry_id, error=error.message)
    return []
