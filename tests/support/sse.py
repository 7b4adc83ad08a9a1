"""Read server-sent events, from an answer as it comes or from its whole body."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

_COMMENT = re.compile(rb"^:.*\n", re.MULTILINE)


def without_comments(events: bytes) -> bytes:
    """``events`` without their comments, which are single lines before an event's own."""
    return _COMMENT.sub(b"", events)


async def read_data(answer: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """The data of each event, in one line each; comments are skipped."""
    async for line in answer.content:
        if line.startswith(b"data: "):
            yield line[6:].decode().strip()


async def read_events(answer: aiohttp.ClientResponse, count: int) -> list[bytes]:
    """The next ``count`` whole events, or all that come until the stream ends, each with its blank line; comments are
    left out. A later call goes on behind them."""
    events: list[bytes] = []
    while len(events) < count and (block := await answer.content.readuntil(b"\n\n")):
        assert block.endswith(b"\n\n"), f"the stream ended within an event: {block!r}"
        # A block of comments alone is no event.
        if event := without_comments(block[:-1]):
            events.append(event + b"\n")
    return events


def parse_events(stream: bytes) -> list[dict[str, Any]]:
    """The JSON objects of a whole stream; comments and ``[DONE]`` are skipped."""
    events = []
    for block in stream.split(b"\n\n"):
        data = [line[6:] for line in block.splitlines() if line.startswith(b"data: ")]
        if data and data != [b"[DONE]"]:
            events.append(json.loads(data[0]))
    return events
