"""HTTP client sessions for calls within the fleet, all with the same limits."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping

import aiohttp


def fleet_session(
    total_s: float | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    connections: int = 100,
    line_bytes: int = 2**16,
) -> aiohttp.ClientSession:
    """A client session that never uses a proxy, whatever HTTP_PROXY, HTTPS_PROXY and ALL_PROXY say: the fleet's
    addresses are loopback or private, and calls carry the join token.

    ``total_s`` limits each call as a whole. ``connections`` is how many it opens at once; 0: any number. ``line_bytes``
    is the size of its read buffers. Call it within a running event loop.
    """
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=total_s),
        headers=headers,
        connector=aiohttp.TCPConnector(limit=connections),
        read_bufsize=line_bytes,
        trust_env=False,
    )


def direct_opener() -> urllib.request.OpenerDirector:
    """The same without an event loop: what ``urllib.request.urlopen`` would be without proxies."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))
