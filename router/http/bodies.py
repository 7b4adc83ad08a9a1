"""Reads a request's body within its limits."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from queue_schemas import BadRequest

from .rules import check_size


class ClientGone(Exception):
    """The client disconnected before the response was complete."""


async def read_request_body(request: Request) -> bytes:
    """The body of a request to a FastAPI route; the app limits its size. Raises ``BadRequest`` if it is cut short."""
    try:
        return await request.body()
    except ClientDisconnect:
        raise BadRequest("the body was cut short: send it again") from None


async def read_body(receive: Receive, limit_bytes: int, take: Callable[[int], None]) -> bytes:
    """The whole body. ``take`` is called with its size so far before more is read, and may raise.

    Raises ``BodyTooLarge`` as soon as it passes the limit, ``ClientGone`` if it is cut short, and what ``take`` raises.
    """
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message.get("body", b"")
        check_size(len(body), limit_bytes)
        take(len(body))
        return body
    pieces = []
    size = 0
    while message["type"] == "http.request":
        piece = message.get("body", b"")
        size += len(piece)
        check_size(size, limit_bytes)
        take(size)
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)
        message = await receive()
    raise ClientGone
