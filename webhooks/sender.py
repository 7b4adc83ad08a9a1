"""Make one attempt to deliver a webhook: an HTTP POST to a checked address, on its own connection, within a time limit.

Each attempt resolves the host once, requires all its addresses to be allowed, and connects to these addresses only: DNS
rebinding has no effect. No proxies, no redirects, no cookies.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from queue_schemas import InferqError

from .core.url_rules import Address, Target, UrlRules, check_url
from .dns_lookups import DnsLookups

MAX_HEADER_BYTES = 8190
USER_AGENT = f"inferq-webhooks/{version('inferq')}"


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of an attempt. ``status`` is None if no answer came, and ``error`` says why. Only the head of an
    answer is read: its status decides."""

    took_ms: int
    status: int | None = None
    error: str = ""
    retry_after: str = ""


class _NotSendable(Exception):
    """The request was not sent; the message says why."""


class Sender:
    """For one event loop. ``timeout_s`` bounds each attempt. ``tls`` verifies receivers, by default with the machine's
    certificates."""

    def __init__(
        self, rules: UrlRules, timeout_s: float, *, lookups: DnsLookups | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self._rules = rules
        self._timeout_s = timeout_s
        self._lookups = lookups or DnsLookups()
        self._tls = tls or ssl.create_default_context()

    async def send(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """POST ``body``, once."""
        started_at = time.monotonic()
        status, error, retry_after = None, "", ""
        try:
            async with asyncio.timeout(self._timeout_s):
                status, retry_after = await self._post(url, headers, body)
        except TimeoutError:
            error = f"no answer within {self._timeout_s:g} s"
        except (aiohttp.ClientError, _NotSendable, OSError, ssl.SSLError, InferqError) as failure:
            error = _reason(failure)
        return Answer(round((time.monotonic() - started_at) * 1000), status, error, retry_after)

    async def _post(self, url: str, headers: Mapping[str, str], body: bytes) -> tuple[int, str]:
        target = check_url(url, self._rules)
        destination = URL(url, encoded=True)
        # Compare the raw host: the other form is decoded from xn--.
        if (destination.raw_host or "").lower() != target.host or destination.port != target.port:
            raise _NotSendable("the URL's host is ambiguous")
        addresses = await self._addresses(target)
        connector = aiohttp.TCPConnector(
            resolver=_FixedResolver(addresses),
            use_dns_cache=False,
            force_close=True,
            ssl=self._tls,
            socket_factory=lambda info: _checked_socket(info, target, self._rules),
        )
        async with (
            aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=self._timeout_s),
                trust_env=False,
                auto_decompress=False,
                max_line_size=MAX_HEADER_BYTES,
                max_field_size=MAX_HEADER_BYTES,
            ) as session,
            session.post(
                destination,
                data=body,
                headers={"content-type": "application/json", "user-agent": USER_AGENT, **headers},
                allow_redirects=False,
            ) as answer,
        ):
            return answer.status, answer.headers.get("retry-after", "")[:100]

    async def _addresses(self, target: Target) -> Sequence[Address]:
        literal = target.address
        found = [literal] if literal is not None else await self._lookup(target)
        if not found or not all(self._rules.allows(target.host, address) for address in found):
            # Leave the addresses out of the error: the name may be one of the operator's network.
            raise _NotSendable("the host's address is not on the public internet")
        return found

    async def _lookup(self, target: Target) -> Sequence[Address]:
        try:
            return await self._lookups.addresses(target.host, target.port)
        except OSError as error:
            raise _NotSendable("the host's name cannot be resolved") from error


class _FixedResolver(AbstractResolver):
    """Returns addresses that were resolved and checked before."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self._addresses
        ]

    async def close(self) -> None:
        """Nothing to close."""


def _checked_socket(info: aiohttp.AddrInfoType, target: Target, rules: UrlRules) -> socket.socket:
    """The socket for a connection. Raises ``OSError`` if its address is not allowed."""
    family, kind, protocol, _, address = info
    if not rules.allows(target.host, ipaddress.ip_address(str(address[0]).partition("%")[0])):
        raise OSError("the host's address is not on the public internet")
    return socket.socket(family, kind, protocol)


_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (aiohttp.ClientConnectorCertificateError, "its TLS certificate is not valid"),
    (aiohttp.ClientSSLError, "no TLS connection could be made"),
    (aiohttp.ServerDisconnectedError, "the connection was closed before an answer came"),
    (aiohttp.ClientPayloadError, "the reply is not an HTTP answer"),
    (aiohttp.ClientResponseError, "the reply is not an HTTP answer"),
)


def _reason(error: Exception) -> str:
    """Why there was no answer, as a phrase for the endpoint's owner."""
    if isinstance(error, InferqError):
        return error.message
    if isinstance(error, _NotSendable):
        return str(error)
    for kind, words in _REASONS:
        if isinstance(error, kind):
            return words
    if isinstance(error, aiohttp.ClientConnectorError):
        # By its number: its message names the address, which the tenant must not learn.
        return f"no connection: {os.strerror(error.os_error.errno or errno.ECONNREFUSED).lower()}"
    return "the connection broke"
