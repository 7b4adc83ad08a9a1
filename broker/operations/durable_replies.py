"""Reply streams that outlive their reader, for batches: entries stay until they are trimmed by id.

A Router's reply stream is trimmed as it is read and expires a minute after the Router. A batch stores what comes before
it counts as received, so its stream keeps entries until it drops them, and another process can read on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from queue_schemas import Frame, Marker, SessionId, ShardKeys

from ..redis.calls import Caller
from ..redis.server_checks import read_run_id
from ..redis.streams import read_stream
from .replies import extend_reply_stream, parse_reply

MAX_READ = 128


@dataclass(frozen=True, slots=True)
class ReplyMessage:
    """One entry of a reply stream: its id and its frames or marker; none if it was malformed."""

    entry_id: str
    content: tuple[Frame | Marker, ...]


class DurableReplies:
    """Durable reply streams. Each is on one shard, whose jobs name it in ``reply_to``."""

    def __init__(self, caller: Caller, keys: Sequence[ShardKeys]) -> None:
        self._caller = caller
        self._keys = keys

    async def open(self, shard: int, name: SessionId, ttl_ms: int) -> bool:
        """Make a reply stream, or extend the life of an existing one, to ``ttl_ms`` from now. Returns whether it had to
        be made. While there is none, jobs that name it are cancelled rather than run."""
        return await extend_reply_stream(self._caller, self._keys[shard], name, ttl_ms)

    async def read(
        self, shard: int, name: SessionId, after: str, block_ms: int, count: int = MAX_READ
    ) -> list[ReplyMessage]:
        """Up to ``count`` entries after the one with the id ``after`` ("0": from the first), waiting up to ``block_ms``
        for one. One try: a server that was away since the last call is an error once, because it may have restarted.
        Malformed entries are logged and empty. One call at a time per shard."""
        keys = self._keys[shard]
        entries = await read_stream(
            self._caller, keys.reply(name), after, count, block_ms, connection_of=keys.prefix + "durable_replies"
        )
        return [ReplyMessage(entry_id, tuple(parse_reply(entry_id, fields))) for entry_id, fields in entries]

    async def trim(self, shard: int, name: SessionId, through: str) -> None:
        """Remove the entries up to and including the one with the id ``through``."""
        key = self._keys[shard].reply(name)
        milliseconds, _, number = through.partition("-")
        await self._caller.command(key, "XTRIM", key, "MINID", f"{milliseconds}-{int(number or 0) + 1}")

    async def close(self, shard: int, name: SessionId) -> None:
        """Delete a reply stream. Waiting jobs that name it are cancelled when a worker claims them."""
        key = self._keys[shard].reply(name)
        await self._caller.command(key, "DEL", key)

    async def server_run_id(self, shard: int) -> str:
        """The run id of the shard's server, which changes at a restart that may have lost the latest writes; empty
        if the server does not report it. One try."""
        return await read_run_id(self._caller, self._keys[shard].budget)
