"""Which URLs and addresses webhooks may be sent to. Pure.

Tenants choose the URLs, and the notifier runs inside the operator's network: anything that is not on the public
internet is refused unless the operator allows it. A URL is checked when it is set, and its host's addresses at each
attempt. Sources: the IANA special-purpose address registries (RFC 6890), RFC 6052 (NAT64), RFC 3056 (6to4), the WHATWG
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
"""Printable ASCII without spaces and without the backslash, which some parsers read as a slash."""
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_LOCAL_SUFFIXES = ("localhost", "local", "localdomain", "internal", "intranet", "lan", "home.arpa")
"""Suffixes of names that are not on the public internet (RFC 6761, RFC 6762, RFC 8375, and common use)."""
_NOT_PUBLIC = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's platform service, reachable in every Azure network
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
    """A checked URL's scheme, host and port. ``host`` is in lower case; an IPv6 address has no brackets."""

    scheme: str
    host: str
    port: int

    @property
    def address(self) -> Address | None:
        """The host if it is an address rather than a name."""
        return _address(self.host)


@dataclass(frozen=True, slots=True)
class UrlRules:
    """What the operator allows in addition to https and public addresses."""

    allow_http: bool = False
    hosts: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()

    @classmethod
    def allowing(cls, entries: Iterable[str], *, allow_http: bool) -> Self:
        """``entries`` are host names, addresses and networks. Raises ``ValueError`` for anything else."""
        hosts, networks = set[str](), list[Network]()
        for entry in entries:
            try:
                networks.append(ipaddress.ip_network(entry))
            except ValueError:
                if "/" in entry or not _is_name(entry.lower()):
                    raise ValueError(f"{entry!r} is not a host name, address or network (such as 10.0.0.0/8)") from None
                hosts.add(entry.lower())
        return cls(allow_http, frozenset(hosts), tuple(networks))

    def allows(self, host: str, address: Address) -> bool:
        """Whether a webhook for ``host`` may be sent to ``address``."""
        if host in self.hosts or is_public(address):
            return True
        embedded = _embedded(address) or address
        return any(embedded in network or address in network for network in self.networks)


def check_url(url: str, rules: UrlRules) -> Target:
    """The target of ``url``. Raises ``BadRequest`` with the reason why it is not allowed.

    The addresses of its host are not checked here: they may change at any time.
    """
    if len(url) > MAX_URL_CHARS:
        raise _refusal(f"has more than {MAX_URL_CHARS} characters")
    if not _PLAIN.fullmatch(url):
        raise _refusal(
            "has characters that are not valid in a URL: percent-encode its path, and write its host in the xn-- form"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _refusal("cannot be parsed") from None
    if parts.scheme not in {"http", "https"} or not url.lower().startswith(f"{parts.scheme}://"):
        raise _refusal("does not begin with https://")
    if parts.scheme == "http" and not rules.allow_http:
        raise _refusal("is not https, which this server requires ([webhooks] allow_http)")
    if "@" in parts.netloc:
        raise _refusal("has a user name or password: verify the signature instead, or put a token in the path")
    if parts.fragment or "#" in url:
        raise _refusal("has a fragment (#...), which is never sent")
    if port == 0:
        raise _refusal("has the port 0")
    host = (parts.hostname or "").lower()
    bracketed = parts.netloc.startswith("[")
    if parts.netloc.lower() != (f"[{host}]" if bracketed else host) + ("" if port is None else f":{port}"):
        raise _refusal("cannot be parsed: write https://, a host, and optionally a colon and a port")
    _check_host(host, bracketed=bracketed, rules=rules)
    return Target(parts.scheme, host, port or (443 if parts.scheme == "https" else 80))


def is_public(address: Address) -> bool:
    """Whether ``address``, and an IPv4 address embedded in it, is on the public internet."""
    embedded = _embedded(address)
    if embedded is not None:
        return is_public(embedded)
    return address.is_global and not any(address in network for network in _NOT_PUBLIC)


def _check_host(host: str, *, bracketed: bool, rules: UrlRules) -> None:
    address = _address(host)
    if address is None and (bracketed or not _is_name(host)):
        raise _refusal("has a host name that is not valid: give one like hooks.example.com")
    if address is not None:
        if not rules.allows(host, address):
            raise _refusal("names an address that is not on the public internet")
    elif host not in rules.hosts and ("." not in host or any(_is_under(host, name) for name in _LOCAL_SUFFIXES)):
        raise _refusal("names a host that is not on the public internet")


def _is_name(host: str) -> bool:
    """Whether every parser takes ``host`` for a name: some take ``127.1``, ``0x7f01`` and ``2130706433`` for
    addresses."""
    labels = host.split(".")
    return len(host) <= 253 and all(_LABEL.fullmatch(label) for label in labels) and not _NUMBER.fullmatch(labels[-1])


def _is_under(host: str, name: str) -> bool:
    return host == name or host.endswith(f".{name}")


def _address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host) if "%" not in host else None
    except ValueError:
        return None


def _embedded(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address embeds: packets for the one reach the other."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.sixtofour if address in _6TO4 else None


def _refusal(why: str) -> BadRequest:
    return BadRequest(f"the webhook's URL {why}", param="url")
