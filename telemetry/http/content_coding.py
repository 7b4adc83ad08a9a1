"""Request bodies with a ``Content-Encoding``, decoded piece by piece as an app reads them.

The app's own limits on a body hold for what it decodes to, and stop a bomb where they stop any body: no more than a
piece is ever decoded ahead. One coding is taken, not several upon each other.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterable
from functools import wraps

from starlette.types import Message, Receive

from queue_schemas import BadRequest, UnsupportedEncoding

CONTENT_ENCODING = b"content-encoding"
ACCEPT_ENCODING = b"gzip, deflate"
"""What answers of status 415 say in ``Accept-Encoding``."""
PIECE_BYTES = 64 * 1024
_EMPTY_BYTES = 64 * 1024
"""How much of a body may decode to nothing."""
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
_RAW_DEFLATE = -15


def decoded_body(receive: Receive, headers: Iterable[tuple[bytes, bytes]]) -> Receive:
    """``receive`` whose body is decoded as ``headers`` say; ``receive`` itself if they say nothing.

    Raises ``UnsupportedEncoding``; what comes back raises ``BadRequest`` for a body that is not what it says.
    """
    given = b",".join(value for name, value in headers if name == CONTENT_ENCODING).decode("latin-1")
    codings = [coding for part in given.split(",") if (coding := part.strip().lower()) not in ("", "identity")]
    if not codings:
        return receive
    if len(codings) > 1 or codings[0] not in _WINDOW_BITS:
        raise UnsupportedEncoding(
            f"a body with the Content-Encoding {', '.join(codings)[:60]!r} is not decoded here: send it plainly, or "
            "with one of gzip and deflate"
        )
    body = _Decoding(receive, codings[0])

    @wraps(receive)
    async def decoded() -> Message:
        return await body.receive()

    return decoded


class _Decoding:
    def __init__(self, receive: Receive, coding: str) -> None:
        self._receive = receive
        self._coding = coding
        self._inflater = zlib.decompressobj(_WINDOW_BITS[coding])
        self._input = b""
        self._full = False
        """The last step filled its piece: there may be more without more input."""
        self._more = True
        self._begun = self._over = False
        self._taken_bytes = self._made_bytes = 0

    async def receive(self) -> Message:
        while not self._over:
            if self._full or len(self._input) > (0 if self._begun else 1) or (self._input and not self._more):
                if piece := self._step():
                    await asyncio.sleep(0)  # a large body is not decoded in one go
                    return {"type": "http.request", "body": piece, "more_body": True}
            elif self._more:
                message = await self._receive()
                if message["type"] != "http.request":
                    return message
                body = message.get("body", b"")
                self._input += body  # of which there is a byte at most: two tell what deflate is
                self._taken_bytes += len(body)
                self._more = message.get("more_body", False)
            else:
                self._over = True
                if self._begun and not self._inflater.eof:
                    raise BadRequest(f"the body ends before its {self._coding} stream does")
                return {"type": "http.request", "body": b"", "more_body": False}
        return await self._receive()

    def _step(self) -> bytes:
        try:
            piece = self._inflate()
        except zlib.error as error:
            raise BadRequest(f"the body is not {self._coding}, as its Content-Encoding says: {error}") from None
        self._made_bytes += len(piece)
        if self._taken_bytes - len(self._input) > _EMPTY_BYTES + 2 * self._made_bytes:
            raise BadRequest(f"the body's {self._coding} stream holds next to nothing")
        return piece

    def _inflate(self) -> bytes:
        if self._inflater.eof:
            if self._coding == "deflate":
                raise zlib.error("data follows its end")
            self._inflater = zlib.decompressobj(_WINDOW_BITS[self._coding])  # the next member
        try:
            piece = self._inflater.decompress(self._input, PIECE_BYTES)
        except zlib.error:
            if self._begun or self._coding != "deflate":
                raise
            # Some clients send deflate without zlib's header, against RFC 9110.
            self._inflater = zlib.decompressobj(_RAW_DEFLATE)
            piece = self._inflater.decompress(self._input, PIECE_BYTES)
        self._begun = True
        self._full = len(piece) == PIECE_BYTES and not self._inflater.eof
        self._input = self._inflater.unused_data if self._inflater.eof else self._inflater.unconsumed_tail
        return piece
