"""Derive the URL that a service advertises to the fleet when no setting names one."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

_ANY = ("0.0.0.0", "::", "")  # noqa: S104 - compared, not bound
_TOWARDS_PORT = 6379


def advertised_url(host: str, port: int, towards_url: str = "") -> str:
    """``http://host:port``; for a wildcard ``host``, with the address that this machine has on the way to the (first)
    host of ``towards_url``, which the others reach as well, or else with its name. Blocks while it looks a name up."""
    if host in _ANY:
        host = _local_address(_first_host(towards_url)) or socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _first_host(url: str) -> str:
    """Of ``redis://user:password@host:6379,other:6379/0`` the first host."""
    try:
        first = urlsplit(url).netloc.rpartition("@")[2].split(",")[0]
        return urlsplit(f"//{first}").hostname or ""
    except ValueError:
        return ""


def _local_address(towards: str) -> str:
    if not towards:
        return ""
    try:
        found = socket.getaddrinfo(towards, _TOWARDS_PORT, type=socket.SOCK_DGRAM)
        family, kind, proto, _, address = found[0]
        with socket.socket(family, kind, proto) as probe:
            probe.connect(address)  # of a datagram socket: only chooses the way
            local: str = probe.getsockname()[0]
            return "" if "%" in local else local
    except (OSError, UnicodeError):
        return ""
