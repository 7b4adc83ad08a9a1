"""Looking up names, each in a thread of its own: a name server that hangs holds that thread and nothing else."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from .urls import Address

MAX_LOOKUPS = 128
Lookup = Callable[[str, int], Sequence[Address]]
"""The addresses of a host, for a port. Blocks; raises ``OSError``."""


def system_lookup(host: str, port: int) -> list[Address]:
    """What this machine's resolver says."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in found]


class Lookups:
    """For one event loop."""

    def __init__(self, lookup: Lookup = system_lookup) -> None:
        self._lookup = lookup
        self._running: dict[tuple[str, int], asyncio.Future[Sequence[Address]]] = {}

    async def addresses(self, host: str, port: int) -> Sequence[Address]:
        """The addresses of ``host``. Raises ``OSError``. Whoever asks for what is being looked up gets that answer."""
        running = self._running.get((host, port))
        if running is None:
            if len(self._running) >= MAX_LOOKUPS:
                raise OSError("too many names are being looked up")
            running = self._begin(host, port)
        return await asyncio.shield(running)

    def _begin(self, host: str, port: int) -> asyncio.Future[Sequence[Address]]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Sequence[Address]] = loop.create_future()
        answer.add_done_callback(self._retrieved)
        self._running[host, port] = answer

        def settle(found: Sequence[Address], error: OSError | None) -> None:
            del self._running[host, port]
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(found)

        def look() -> None:
            found, error = list[Address](), None
            try:
                found = list(self._lookup(host, port))
            except OSError as failed:
                error = failed
            except (UnicodeError, ValueError) as failed:
                error = OSError(str(failed))
            with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                loop.call_soon_threadsafe(settle, found, error)

        # A daemon: a name server that hangs must not keep the process from ending.
        threading.Thread(target=look, name="name lookup", daemon=True).start()
        return answer

    @staticmethod
    def _retrieved(answer: asyncio.Future[Sequence[Address]]) -> None:
        """Whoever asked may have given up: its error is nobody's then."""
        answer.exception()
