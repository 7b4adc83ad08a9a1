"""Read the lines of a batch's output and error files as they arrive."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson

from inferq.batch.client import BatchClient
from inferq.client import RequestFailed


async def lines_of(client: BatchClient, file_id: str) -> AsyncIterator[dict[str, Any]]:
    """The lines of a file, parsed."""
    rest = b""
    async for piece in client.content(file_id, 0, await client.size(file_id)):
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            if line:
                yield parse_line(line, file_id)
    if rest:
        yield parse_line(rest, file_id)


def parse_line(line: bytes, file_id: str) -> dict[str, Any]:
    """One line of an output or error file, parsed. Raises ``RequestFailed`` if it is invalid."""
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise RequestFailed(f"the file {file_id} has a line that is not a JSON object")
    return found


def text_of(line: dict[str, Any]) -> str:
    """The text of an answer of any endpoint; empty if it has none."""
    body = (line.get("response") or {}).get("body")
    if not isinstance(body, dict):
        return ""
    for choice in body.get("choices") or ():
        return str((choice.get("message") or {}).get("content") or choice.get("text") or "")
    said = [
        part.get("text") or ""
        for item in body.get("output") or ()
        for part in item.get("content") or ()
        if part.get("type") == "output_text"
    ]
    return "".join(said)
