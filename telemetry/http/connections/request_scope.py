"""The ASGI scope of a request, from its head and the ends of its connection."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import unquote

Endpoint = tuple[str, int] | None
Endpoints = tuple[Endpoint, Endpoint]
"""The client's address and the server's; None where there is none, as of a Unix socket."""


def endpoints(transport: asyncio.BaseTransport) -> Endpoints:
    """The addresses of both ends of a connection."""
    return _endpoint(transport, "peername"), _endpoint(transport, "sockname")


def request_scope(
    ends: Endpoints,
    method: bytes,
    version: str,
    target: tuple[bytes, bytes],
    headers: list[tuple[bytes, bytes]],
    app_state: dict[str, Any],
) -> dict[str, Any]:
    """The scope of one request. ``target``: raw path and query."""
    raw_path, query = target
    path = raw_path.decode("latin-1")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": version,
        "server": ends[1],
        "client": ends[0],
        "scheme": "http",
        "method": method.decode("ascii"),
        "root_path": "",
        "path": unquote(path) if "%" in path else path,
        "raw_path": raw_path,
        "query_string": query,
        "headers": headers,
        "state": app_state.copy(),
    }


def _endpoint(transport: asyncio.BaseTransport, which: str) -> Endpoint:
    found = transport.get_extra_info(which)
    return (str(found[0]), int(found[1])) if isinstance(found, (list, tuple)) and len(found) > 1 else None
