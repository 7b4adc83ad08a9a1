"""Event streams as clients decode them: a parser after the standard, and the unmodified SDKs' own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import anthropic._streaming
import openai._streaming

Event = tuple[str, str]
"""Name (empty without one) and data."""


def standard_events(pieces: Iterable[bytes]) -> list[Event]:
    """What an event source dispatches (WHATWG HTML, 9.2.6), each piece as it comes."""
    stream = b"".join(pieces).decode("utf-8").removeprefix("\ufeff")
    lines = stream.replace("\r\n", "\n").replace("\r", "\n").split("\n")[:-1]
    events: list[Event] = []
    name, data = "", ""
    for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                events.append((name, data[:-1]))
            name, data = "", ""
        elif field == "event":
            name = value
        elif field == "data":
            data += value + "\n"
    return events


def openai_events(pieces: Iterable[bytes]) -> list[Event]:
    """What the decoder of openai for Python yields."""
    return [(event.event or "", event.data) for event in openai._streaming.SSEDecoder().iter_bytes(iter(pieces))]


def anthropic_events(pieces: Iterable[bytes]) -> list[Event]:
    """What the decoder of anthropic for Python yields."""
    return [(event.event or "", event.data) for event in anthropic._streaming.SSEDecoder().iter_bytes(iter(pieces))]


DECODERS: dict[str, Callable[[Iterable[bytes]], list[Event]]] = {
    "standard": standard_events,
    "openai": openai_events,
    "anthropic": anthropic_events,
}


def single_bytes(data: bytes) -> list[bytes]:
    """``data``, a byte at a time."""
    return [data[at : at + 1] for at in range(len(data))]
