"""What the processes of one Router and their parent say to each other: msgpack arrays, ``[kind, *values]``."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import msgpack

from queue_schemas.codec import encode

MAX_UNREAD_BYTES = 64 << 20


class Kind(StrEnum):
    """The first element of a message."""

    READY = "ready"
    """Child: it accepts connections."""
    REFUSED = "refused"
    """Child: a sentence that says why it cannot start."""
    FIGURES = "figures"
    """Child: its metrics (:mod:`.merged_metrics`)."""
    SCRAPE = "scrape"
    """Child: its metrics, and that it wants those of all."""
    MERGED = "merged"
    """Parent: the metrics of all, for each SCRAPE."""
    COLLECT = "collect"
    """Parent: asks for FIGURES."""
    STOP = "stop"
    """Parent: shut down in good order."""
    HANGUP = "hangup"
    """Parent: the terminal has gone."""
    HURRY = "hurry"
    """Parent: end open requests at once."""


def pack(kind: Kind, *values: Any) -> bytes:
    """One message as bytes."""
    return encode([str(kind), *values])


class MessageReader:
    """Cuts what arrives into messages. Raises ``ValueError`` for what is none."""

    def __init__(self) -> None:
        self._unpacker = msgpack.Unpacker(max_buffer_size=MAX_UNREAD_BYTES)

    def feed(self, data: bytes) -> Iterator[tuple[Kind, list[Any]]]:
        """The messages that ``data`` completes."""
        self._unpacker.feed(data)
        for kind, *values in self._unpacker:
            yield Kind(kind), values
