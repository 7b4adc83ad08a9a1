"""Where webhooks may go: rules for URLs and for the addresses behind them. Pure.

A tenant chooses the URL, and this side of the network is not the tenant's: whatever is not on the public internet is
refused unless the operator allows it. A URL is checked when it is given, and the addresses its host has when it is
used. Sources: the IANA special-purpose address registries (RFC 6890), RFC 6052 (NAT64), RFC 3056 (6to4), the WHATWG
URL standard (hosts that end in a number).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

from queue_schemas import BadRequest

MAX_URL_CHARS = 2048
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_PLAIN = re.compile(r"[!-\[\]-~]+")
"""Printable ASCII without blanks and without the backslash, which some parsers take for a slash."""
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_HERE = ("localhost", "local", "localdomain", "internal", "intranet", "lan", "home.arpa")
"""Ends of names that have no meaning on the public internet (RFC 6761, RFC 6762, RFC 8375, and habit)."""
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",  # the platform's own service within every Azure network
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",
        "::/8",
        "64:ff9b:1::/48",
        "100::/8",
        "2001::/23",
        "2001:db8::/32",
        "3fff::/20",
        "5f00::/16",
        "fc00::/6",
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_6TO4 = ipaddress.IPv6Network("2002::/16")


@dataclass(frozen=True, slots=True)
class Target:
    """What a checked URL names. ``host`` is in lower case, an IPv6 address without its brackets."""

    scheme: str
    host: str
    port: int

    @property
    def address(self) -> Address | None:
        """The host, where it is an address and no name."""
        return _address(self.host)


@dataclass(frozen=True, slots=True)
class UrlRules:
    """What the operator allows beside https to public addresses."""

    allow_http: bool = False
    hosts: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()

    @classmethod
    def allowing(cls, entries: Iterable[str], *, allow_http: bool) -> Self:
        """``entries`` are names of hosts, addresses and networks. Raises ``ValueError`` for what is none of them."""
        hosts, networks = set[str](), list[Network]()
        for entry in entries:
            try:
                networks.append(ipaddress.ip_network(entry))
            except ValueError:
                if "/" in entry or not _is_name(entry.lower()):
                    raise ValueError(f"{entry!r} is no name, address or network (such as 10.0.0.0/8)") from None
                hosts.add(entry.lower())
        return cls(allow_http, frozenset(hosts), tuple(networks))

    def allows(self, host: str, address: Address) -> bool:
        """Whether a webhook for ``host`` may be sent to ``address``."""
        if host in self.hosts or is_public(address):
            return True
        carried = _carried(address) or address
        return any(carried in network or address in network for network in self.networks)


def check_url(url: str, rules: UrlRules) -> Target:
    """What ``url`` names. Raises ``BadRequest`` with what is wrong with it.

    Its host's addresses are not looked at here: they may be others at every look.
    """
    if len(url) > MAX_URL_CHARS:
        raise _refusal(f"has more than {MAX_URL_CHARS} characters")
    if not _PLAIN.fullmatch(url):
        raise _refusal("has characters that no URL has: percent-encode its path, write its host in the xn-- form")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _refusal("cannot be read") from None
    if parts.scheme not in {"http", "https"} or not url.lower().startswith(f"{parts.scheme}://"):
        raise _refusal("does not begin with https://")
    if parts.scheme == "http" and not rules.allow_http:
        raise _refusal("is not https, which this server asks for ([webhooks] allow_http)")
    if "@" in parts.netloc:
        raise _refusal("holds a user name or password: let the signature tell who sends, or put a token in its path")
    if parts.fragment or "#" in url:
        raise _refusal("has a part behind #, which is never sent")
    if port == 0:
        raise _refusal("has the port 0")
    host = (parts.hostname or "").lower()
    bracketed = parts.netloc.startswith("[")
    if parts.netloc.lower() != (f"[{host}]" if bracketed else host) + ("" if port is None else f":{port}"):
        raise _refusal("cannot be read: behind https:// stands a host, and maybe a colon and a port")
    _check_host(host, bracketed=bracketed, rules=rules)
    return Target(parts.scheme, host, port or (443 if parts.scheme == "https" else 80))


def is_public(address: Address) -> bool:
    """Whether ``address`` is one of the public internet, also where it carries another one within."""
    carried = _carried(address)
    if carried is not None:
        return is_public(carried)
    return address.is_global and not any(address in network for network in _NOT_PUBLIC)


def _check_host(host: str, *, bracketed: bool, rules: UrlRules) -> None:
    address = _address(host)
    if address is None and (bracketed or not _is_name(host)):
        raise _refusal("names no host that could be looked up: give a name like hooks.example.com")
    if address is not None:
        if not rules.allows(host, address):
            raise _refusal("names an address that is not on the public internet")
    elif host not in rules.hosts and ("." not in host or any(_below(host, name) for name in _HERE)):
        raise _refusal("names a host that is not on the public internet")


def _is_name(host: str) -> bool:
    """Whether ``host`` is a name to every parser: ``127.1``, ``0x7f01`` and ``2130706433`` are addresses to some."""
    labels = host.split(".")
    return len(host) <= 253 and all(_LABEL.fullmatch(label) for label in labels) and not _NUMBER.fullmatch(labels[-1])


def _below(host: str, name: str) -> bool:
    return host == name or host.endswith(f".{name}")


def _address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host) if "%" not in host else None
    except ValueError:
        return None


def _carried(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address to which packets for an IPv6 address go in the end."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.sixtofour if address in _6TO4 else None


def _refusal(why: str) -> BadRequest:
    return BadRequest(f"the webhook's URL {why}", param="url")
