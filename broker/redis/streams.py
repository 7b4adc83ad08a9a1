"""Read a Redis stream, waiting for its next entries: for Routers, workers and batches, as (entry id, fields) pairs."""

from __future__ import annotations

from typing import Any

from .calls import Caller
from .failures import FAILURES, as_inferq_error

Entries = list[tuple[str, dict[bytes, bytes]]]


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
