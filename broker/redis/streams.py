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
    entries = next(iter(reply.values())) if isinstance(reply, dict) else reply[0][1]
    if isinstance(entries[0][0], (list, tuple)):
        entries = entries[0]  # redis-py wraps a stream's entries once more under some protocols
    return [(_text(entry_id), _fields(fields)) for entry_id, fields in entries]


def _text(raw: bytes | str) -> str:
    return raw.decode() if isinstance(raw, bytes) else raw


def _fields(raw: Any) -> dict[bytes, bytes]:
    if isinstance(raw, dict):
        return raw
    return {raw[0]: raw[1]} if len(raw) == 2 else dict(zip(raw[::2], raw[1::2], strict=True))
