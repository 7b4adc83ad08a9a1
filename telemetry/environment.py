"""What other programs (engines, servers, roles) are started with: an environment without secrets, and free ports."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
from collections import deque
from contextlib import ExitStack
from pathlib import Path

_OURS = "INFERQ_"
_MIN_PORT = 10_000
_PORT_TRIES = 200
_EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_recent: deque[int] = deque(maxlen=256)


def foreign_environment() -> dict[str, str]:
    """This process's environment without every ``INFERQ_*`` variable, in whichever case: settings are read in any."""
    return {name: value for name, value in os.environ.items() if not name.upper().startswith(_OURS)}


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port of ``host`` on which no server listens now.

    It lies below the ports that the kernel gives to outgoing connections, so that none of those takes it before the
    program that it is for listens there, and it is none of the last 256 that this process was given. Where that range
    is unknown, or no port below it is free, it is any free port.
    """
    with _bound_to_a_free_port(host) as probe:
        return _port_of(probe)


class HeldPorts(ExitStack):
    """``with HeldPorts() as ports``: TCP ports of loopback for servers that start later, and perhaps again. Until the
    block ends, nobody else is given one by chance.

    A socket is bound to each and does not listen. On Linux a server that sets ``SO_REUSEADDR``, as ours do, can listen
    there all the same. On other systems a port is only free at the moment at which it is taken.
    """

    def take(self) -> int:
        """One more port."""
        if sys.platform != "linux":
            return free_port()
        holder = self.enter_context(_bound_to_a_free_port("127.0.0.1"))
        # Only now: with it, two could have bound the same one.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return _port_of(holder)


def _bound_to_a_free_port(host: str) -> socket.socket:
    try:
        first_ephemeral = int(_EPHEMERAL_PORTS.read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        first_ephemeral = 0
    bound = socket.socket()
    for _ in range(_PORT_TRIES if first_ephemeral > _MIN_PORT else 0):
        port = random.randrange(_MIN_PORT, first_ephemeral)
        if port in _recent:
            continue
        with contextlib.suppress(OSError):
            bound.bind((host, port))
            _recent.append(port)
            return bound
    bound.bind((host, 0))
    return bound


def _port_of(bound: socket.socket) -> int:
    port: int = bound.getsockname()[1]
    return port
