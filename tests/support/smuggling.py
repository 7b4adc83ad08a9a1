"""Requests that two parsers may read differently, each with another one hidden in it."""

from __future__ import annotations

HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""What must never be a request of its own."""
_EMPTY_CHUNK = b"0\r\n\r\n"


def _post(*headers: str, body: bytes, line: str = "POST /echo HTTP/1.1", host: str = "Host: localhost\r\n") -> bytes:
    lines = "".join(f"{header}\r\n" for header in headers)
    return f"{line}\r\n{host}{lines}\r\n".encode("latin-1") + body


def _length(body: bytes) -> str:
    return f"Content-Length: {len(body)}"


_CHUNKED = _EMPTY_CHUNK + HIDDEN
_CODINGS = {
    "plain": "Transfer-Encoding: chunked",
    "upper": "TRANSFER-ENCODING: CHUNKED",
    "space before the colon": "Transfer-Encoding : chunked",
    "tab": "Transfer-Encoding:\tchunked",
    "vertical tab": "Transfer-Encoding: \x0bchunked",
    "trailing space": "Transfer-Encoding: chunked ",
    "quoted": 'Transfer-Encoding: "chunked"',
    "with a parameter": "Transfer-Encoding: chunked;q=1",
    "unknown": "Transfer-Encoding: xchunked",
    "identity": "Transfer-Encoding: identity",
    "list": "Transfer-Encoding: gzip, chunked",
    "chunked first": "Transfer-Encoding: chunked, identity",
    "twice in a list": "Transfer-Encoding: chunked, chunked",
    "folded": "Transfer-Encoding:\r\n chunked",
    "two": "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    "other order": "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
    "empty": "Transfer-Encoding:",
    "underscore": "Transfer_Encoding: chunked",
    "after a bare CR": "X: y\rTransfer-Encoding: chunked",
    "after a bare LF": "X: y\nTransfer-Encoding: chunked",
    "after a NUL": "X: y\x00\r\nTransfer-Encoding: chunked",
    "leading space": " Transfer-Encoding: chunked",
}
_LENGTHS = {
    "two lengths": "Content-Length: 0\r\n{}",
    "two lengths, other order": "{}\r\nContent-Length: 0",
    "a list of lengths": "Content-Length: 0, {n}",
    "the same twice in a list": "Content-Length: {n}, {n}",
    "plus": "Content-Length: +{n}",
    "minus": "Content-Length: -{n}",
    "hexadecimal": "Content-Length: 0x{n}",
    "underscore": "Content-Length: 1_0",
    "space before the colon": "Content-Length : {n}",
    "empty": "Content-Length:",
    "too long": "Content-Length: " + "9" * 40,
    "folded": "Content-Length:\r\n {n}",
    "folded into another": "X: y\r\n Content-Length: {n}",
    "bare LF": "X: y\nContent-Length: {n}",
    "bare CR": "X: y\rContent-Length: {n}",
}
_CHUNKS = {
    "extension": b"5;a=b\r\nhello\r\n",
    "extension with a bare LF": b"5;a\nhello\r\n",
    "quoted line end in an extension": b'5;a="\r\nhello\r\n',
    "bare LF": b"5\nhello\n",
    "bare LF behind the data": b"5\r\nhello\n",
    "space behind the size": b"5 \r\nhello\r\n",
    "zeros": b"0" * 40 + b"5\r\nhello\r\n",
    "over-long size": b"FFFFFFFFFFFFFFFF5\r\nhello\r\n",
    "32 bits": b"100000005\r\nhello\r\n",
    "hexadecimal": b"0x5\r\nhello\r\n",
    "minus": b"-5\r\nhello\r\n",
    "no line end": b"5\r\nhello",
    "too much": b"5\r\nhelloo\r\n",
    "last by a bare LF": b"5\r\nhello\r\n0\n\n",
    "trailing length": b"0\r\nContent-Length: 50\r\n\r\n",
    "trailing coding": b"0\r\nTransfer-Encoding: chunked\r\n\r\n",
}

PAIRS: dict[str, bytes] = {
    **{
        f"length and coding, {name}": _post(_length(_CHUNKED), coding, body=_CHUNKED)
        for name, coding in _CODINGS.items()
    },
    **{
        f"coding and length, {name}": _post(coding, _length(_CHUNKED), body=_CHUNKED)
        for name, coding in _CODINGS.items()
    },
    **{
        f"short length and coding, {name}": _post("Content-Length: 4", c, body=_CHUNKED) for name, c in _CODINGS.items()
    },
    **{f"coding alone, {name}": _post(coding, body=_CHUNKED) for name, coding in _CODINGS.items()},
    **{
        f"length, {name}": _post(form.format(_length(HIDDEN), n=len(HIDDEN)), body=HIDDEN)
        for name, form in _LENGTHS.items()
    },
    **{
        f"chunk, {name}": _post("Transfer-Encoding: chunked", body=chunk + _EMPTY_CHUNK + HIDDEN)
        for name, chunk in _CHUNKS.items()
    },
    "coding over HTTP/1.0": _post("Transfer-Encoding: chunked", body=_CHUNKED, line="POST /echo HTTP/1.0"),
    "coding over HTTP/1.0, kept": _post(
        "Transfer-Encoding: chunked", "Connection: keep-alive", body=_CHUNKED, line="POST /echo HTTP/1.0"
    ),
    "upgrade to h2c": _post("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", _length(HIDDEN), body=HIDDEN),
    "upgrade to websocket": _post("Connection: Upgrade", "Upgrade: websocket", _length(HIDDEN), body=HIDDEN),
    "length named as hop by hop": _post("Connection: close, content-length", _length(HIDDEN), body=HIDDEN),
    "expecting": _post("Expect: 100-continue", _length(HIDDEN), body=HIDDEN),
    "expecting something else": _post("Expect: 200-ok", _length(HIDDEN), body=HIDDEN),
    "expecting twice": _post("Expect: 100-continue", "Expect: 100-continue", _length(HIDDEN), body=HIDDEN),
    "absolute form": _post(_length(HIDDEN), body=HIDDEN, line="POST http://evil/echo HTTP/1.1"),
    "absolute form with a line": _post(_length(HIDDEN), body=HIDDEN, line="POST http://evil\r\n/echo HTTP/1.1"),
    "two hosts": _post("Host: evil", _length(HIDDEN), body=HIDDEN),
    "no host": _post(_length(HIDDEN), body=HIDDEN, host=""),
    "a body on GET": _post(_length(HIDDEN), body=HIDDEN, line="GET /echo HTTP/1.1"),
    "chunks on GET": _post(
        "Transfer-Encoding: chunked", body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN), line="GET /echo HTTP/1.1"
    ),
    "a body on HEAD": _post(_length(HIDDEN), body=HIDDEN, line="HEAD /echo HTTP/1.1"),
    "connect": _post(body=HIDDEN, line="CONNECT test:80 HTTP/1.1"),
    "version 2": _post(_length(HIDDEN), body=HIDDEN, line="POST /echo HTTP/2.0"),
    "no version": b"POST /echo\r\n\r\n" + HIDDEN,
    "an empty name": _post(": x", _length(HIDDEN), body=HIDDEN),
    "a line without a colon": _post("Content-Length", _length(HIDDEN), body=HIDDEN),
    "bare LFs": _post(_length(HIDDEN), body=HIDDEN).replace(b"\r\n", b"\n"),
}
"""Each is a first request whose body, or what it may be taken for, is :data:`HIDDEN`."""

TWO_BY_RIGHT = frozenset(
    {
        *(f"coding alone, {name}" for name in ("plain", "upper", "tab", "trailing space")),
        *("chunk, extension", "chunk, zeros"),
        *("coding alone, underscore", "short length and coding, underscore"),
        *("length and coding, underscore", "coding and length, underscore"),
    }
)
"""Those that every parser reads alike. (Transfer_Encoding is a header like any other.)"""
