"""Look up host names for the sender, in threads of their own: a name server that hangs delays nothing else."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Sequence

from telemetry.threads import DaemonThreads

from .core.url_rules import Address

MAX_LOOKUPS = 128
Lookup = Callable[[str, int], Sequence[Address]]
"""The addresses of a host, for a port. Blocks; raises ``OSError``."""


def system_lookup(host: str, port: int) -> list[Address]:
    """Ask this machine's resolver."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in found]


class DnsLookups:
    """Concurrent lookups, one at a time of each host. For one event loop."""

    def __init__(self, lookup: Lookup = system_lookup) -> None:
        self._lookup = lookup
        self._threads = DaemonThreads("name lookup", MAX_LOOKUPS)
        self._running: dict[tuple[str, int], asyncio.Task[Sequence[Address]]] = {}

    async def addresses(self, host: str, port: int) -> Sequence[Address]:
        """The addresses of ``host``; concurrent calls share one lookup. Raises ``OSError``."""
        running = self._running.get((host, port))
        if running is None:
            if len(self._running) >= MAX_LOOKUPS:
                raise OSError("too many names are being looked up")
            running = asyncio.create_task(self._look_up(host, port), name=f"lookup of {host}")
            running.add_done_callback(_retrieve)
            self._running[host, port] = running
        return await asyncio.shield(running)

    async def _look_up(self, host: str, port: int) -> Sequence[Address]:
        try:
            return await self._threads.run(lambda: list(self._lookup(host, port)))
        except (UnicodeError, ValueError) as error:
            raise OSError(str(error)) from error
        finally:
            del self._running[host, port]


def _retrieve(lookup: asyncio.Task[Sequence[Address]]) -> None:
    """Retrieve its error: if all its callers timed out, asyncio would log it otherwise."""
    if not lookup.cancelled():
        lookup.exception()
