"""The head of a request as the parser reports it, checked for what a server in front of this one may read otherwise."""

from __future__ import annotations

from typing import Any

import httptools

from queue_schemas import BadRequest, HeadTooLarge
from queue_schemas.errors import VersionRefused

from .limits import ConnectionLimits

_FRAMING = frozenset({b"host", b"content-length", b"transfer-encoding", b"expect"})
_UPGRADE = (b"upgrade", b"http2-settings")


def request_parser(listener: object) -> Any:
    """A parser that calls ``on_url`` and the like of ``listener``."""
    parser = httptools.HttpRequestParser(listener)
    # What follows a request that ends the connection is discarded by it, and is no error of that request.
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


class RequestHead:
    """Collects one head after the other: :meth:`begin`, then httptools calls ``on_url`` and ``on_header``."""

    __slots__ = ("_coding", "_hosts", "body_bytes", "expects_continue", "headers", "reading", "url")

    def __init__(self) -> None:
        self.reading = True
        """Whether a head is expected or arriving; if not, headers are a body's trailers and change nothing."""
        self.begin()

    def begin(self) -> None:
        """A request begins."""
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.body_bytes: int | None = 0
        """The length of its body; None if chunks will tell."""
        self.expects_continue = False
        self._hosts = 0
        self._coding = b""

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.reading:
            return
        name = name.lower()
        self.headers.append((name, value))
        if name not in _FRAMING:
            return
        if name == b"host":
            self._hosts += 1
        elif name == b"content-length":
            self.body_bytes = int(value)
        elif name == b"transfer-encoding":
            self.body_bytes, self._coding = None, self._coding + b"," + value if self._coding else value
        else:
            self.expects_continue = value.lower() == b"100-continue"

    def check(self, version: str, received_bytes: int, limits: ConnectionLimits) -> None:
        """Raise what is wrong with a head that the parser took. ``received_bytes``: at least as many as it has."""
        if version not in ("1.1", "1.0"):
            raise VersionRefused(f"HTTP/{version} is not spoken here: use HTTP/1.1")
        if self._coding and (version == "1.0" or self._coding.strip().lower() != b"chunked"):
            raise BadRequest("the only transfer-encoding is chunked, and only in HTTP/1.1")
        if self._hosts > 1 or (version == "1.1" and not self._hosts):
            raise BadRequest("an HTTP/1.1 request has one Host header")
        if len(self.headers) > limits.header_count:
            raise HeadTooLarge(f"the request has more than {limits.header_count} headers")
        if received_bytes > limits.head_bytes:
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > limits.head_bytes:
                raise HeadTooLarge(f"the request's headers have more than {limits.head_bytes} bytes")

    def target(self) -> tuple[bytes, bytes]:
        """The raw path and the query. Raises ``BadRequest``."""
        if self.url == b"*":
            return b"*", b""
        try:
            url: Any = httptools.parse_url(self.url)
        except httptools.HttpParserInvalidURLError:
            raise BadRequest("the request's target is not a URL") from None
        return url.path or b"/", url.query or b""

    def without_upgrade(self, method: bytes, version: str) -> bytes:
        """The head, written again without its offer to go on in another protocol."""
        lines = [b"%b %b HTTP/%b\r\n" % (method, self.url, version.encode())]
        lines += [b"%b: %b\r\n" % header for header in self.headers if header[0] not in _UPGRADE]
        return b"".join([*lines, b"\r\n"])
