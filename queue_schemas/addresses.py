"""Hide addresses in messages for the public, and tell loopback addresses from others."""

from __future__ import annotations

import ipaddress
import re

_ADDRESS = re.compile(
    r"[a-z][a-z0-9+.-]*://[^\s'\"<>,;)\]]+"  # a URL
    r"|\((?:'[^']*'|\"[^\"]*\"), ?\d+[^)]*\)"  # Python's ('127.0.0.1', 6379)
    r"|\b(?:host|port|path)=[^\s,)>]+"
    r"|\bports? \d+"
    r"|\[[0-9a-f]*:[0-9a-f:.]+\](?::\d+)?"
    r"|\b\d{1,3}(?:\.\d{1,3}){3}\b(?::\d+)?"
    r"|\b[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?:\d{2,5}\b"  # name:port
    r"|(?<![\w/.])/(?:[\w.@+~-]+/)+[\w.@+~-]*",  # a path with folders
    re.IGNORECASE,
)


def hide_addresses(text: str) -> str:
    """``text`` without URLs, hosts with ports, IP addresses and paths: for public messages about
    errors that another program or library worded."""
    return _ADDRESS.sub("(address)", text)


def public_message(reason: str) -> str:
    """The first line of ``reason`` without addresses: further lines may be what another program wrote."""
    return hide_addresses(reason.partition("\n")[0])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``. A name other than localhost counts as public."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
