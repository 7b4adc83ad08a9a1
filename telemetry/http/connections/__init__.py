"""HTTP/1.1 connections for uvicorn's server, which bound what a client sends, how slowly, and what it leaves unread."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .cycle import RequestCycle, ServeDirectly, header_line
from .limits import ConnectionLimits
from .protocol import HttpConnection
from .registry import Connections

__all__ = [
    "ConnectionLimits",
    "Connections",
    "HttpConnection",
    "RequestCycle",
    "ServeDirectly",
    "header_line",
    "protocol_for",
]


def protocol_for(
    connections: Connections, serve_directly: ServeDirectly | None = None
) -> Callable[..., HttpConnection]:
    """What makes the protocol of each connection of one server."""
    return partial(HttpConnection, connections=connections, serve_directly=serve_directly)
