"""Links send commands to one server, a Sentinel service or a Cluster, with the same methods for all.

:func:`open_link` reads the URL. redis-py makes the connections (TLS, ACL, Sentinel, Cluster); its own retries are off,
because it cannot know which calls may be repeated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import redis.asyncio as redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from ..settings import BrokerSettings
from .channel import BECAME_REPLICA
from .cluster import ClusterLink
from .multiplexer import KeyedConnections, MultiplexedConnection
from .urls import check_ca_file, check_connection, check_parts, invalid_url, topology_of


class Link(Protocol):
    """A way to the server. Commands are tuples of str, bytes, int and float; replies are redis-py's, undecoded."""

    async def command(self, key: str, *args: Any) -> Any:
        """Send one command that touches ``key`` and answer its reply."""

    async def blocking(self, key: str, limit_s: float, *args: Any) -> Any:
        """Send a command that may block up to ``limit_s`` on a connection of its own. One that was lost since the last
        such command is raised, once: a reader of a stream has to know that its server was away."""

    async def pipeline(self, key: str, limit_s: float, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """Send commands in one piece on a connection that only pipelines use, which the last of them may block up to
        ``limit_s``. Refusals are ``ResponseError`` in place of a reply; a lost connection is raised."""

    async def forget(self, key: str) -> None:
        """Close what only blocking commands of ``key`` use."""

    async def node_of(self, key: str) -> str:
        """What tells the node that holds ``key`` from others of its topology; empty where there is but one."""

    async def close(self) -> None:
        """Close the connections."""


class MultiplexedLink:
    """A link to one server (standalone, or what Sentinel names): all commands share one connection, each blocking
    reader has its own, by key."""

    def __init__(self, open_connection: Callable[[], AbstractConnection], command_limit_s: float) -> None:
        self._open_connection = open_connection
        self._limit_s = command_limit_s
        self._shared = self._open()
        self._readers = KeyedConnections()
        self._pipelines = KeyedConnections()

    async def command(self, key: str, *args: Any) -> Any:
        try:
            return await self._shared.command(self._limit_s, *args)
        except BECAME_REPLICA:
            # Readers would go on there, and hear nothing of what is written to the primary.
            await self._close_others()
            raise

    async def blocking(self, key: str, limit_s: float, *args: Any) -> Any:
        return await self._readers.blocking(key, "", self._open, limit_s + self._limit_s, *args)

    async def pipeline(self, key: str, limit_s: float, commands: Sequence[Sequence[Any]]) -> list[Any]:
        connection = await self._pipelines.at(key, "", self._open)
        return await connection.pipeline(limit_s + self._limit_s, commands)

    async def forget(self, key: str) -> None:
        await self._readers.forget(key)

    async def node_of(self, key: str) -> str:
        return ""

    async def close(self) -> None:
        await self._shared.close()
        await self._close_others()

    async def _close_others(self) -> None:
        """Close all connections but the shared one; each opens again when it is used."""
        await asyncio.gather(self._readers.close(), self._pipelines.close())

    def _open(self) -> MultiplexedConnection:
        return MultiplexedConnection(self._open_connection, self._limit_s)


class ClientLink:
    """A link over any redis-py client: fakeredis in tests."""

    def __init__(self, client: Any, blocking_client: Any | None = None) -> None:
        self._client = client
        self._blocking = blocking_client or client

    async def command(self, key: str, *args: Any) -> Any:
        return await self._client.execute_command(*args)

    async def blocking(self, key: str, limit_s: float, *args: Any) -> Any:
        # In a task of its own: fakeredis may take a cancellation for the end of its own time limit, and go on.
        return await asyncio.wait_for(self._blocking.execute_command(*args), limit_s + 10)  # noqa: TID251

    async def pipeline(self, key: str, limit_s: float, commands: Sequence[Sequence[Any]]) -> list[Any]:
        async with self._client.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers = pipeline.execute(raise_on_error=False)
            replies: list[Any] = await asyncio.wait_for(answers, limit_s + 10)  # noqa: TID251 - as above
            return replies

    async def forget(self, key: str) -> None:
        return

    async def node_of(self, key: str) -> str:
        return ""

    async def close(self) -> None:
        for client in {id(c): c for c in (self._client, self._blocking)}.values():
            await client.aclose()


def open_link(settings: BrokerSettings) -> Link:
    """A link to ``settings.redis_url``. Connects on first use. Raises ``BrokerUnsuitable`` for a URL that is none."""
    url = settings.redis_url
    scheme, topology = topology_of(url)
    try:
        check_parts(url)
        if scheme == "rediss" and settings.tls_ca_file:
            check_ca_file(settings.tls_ca_file)
        if topology == "sentinel":
            return _sentinel_link(url, scheme == "rediss", settings)
        if topology == "cluster":
            return _cluster_link(url, scheme == "rediss", settings)
        pool = redis.ConnectionPool.from_url(url, **_options(settings, tls=scheme == "rediss", tcp=scheme != "unix"))
        check_connection(pool.make_connection)
        return MultiplexedLink(pool.make_connection, settings.command_timeout_ms / 1000)
    except (ValueError, RedisError) as error:
        raise invalid_url(url, error) from error


def _options(settings: BrokerSettings, *, tls: bool, tcp: bool = True) -> dict[str, Any]:
    options: dict[str, Any] = {
        "protocol": 2,
        "decode_responses": False,
        "socket_connect_timeout": settings.connect_timeout_ms / 1000,
        "socket_timeout": None,
        "retry": Retry(NoBackoff(), 0),
        "retry_on_error": [],
    }
    if tcp:
        options["socket_keepalive"] = True
    if tls and settings.tls_ca_file:
        options["ssl_ca_certs"] = settings.tls_ca_file
    return options


def _hosts(netloc: str, default_port: int) -> Iterable[tuple[str, int]]:
    for part in netloc.split(","):
        split = urlsplit(f"//{part}")
        if not split.hostname:
            raise ValueError(f"{part!r} names no host")
        yield split.hostname, split.port or default_port


def _credentials(url: str) -> tuple[dict[str, Any], str, str]:
    """(username and password options, host list, path) of a URL with several hosts."""
    rest = url.partition("://")[2]
    authority, _, path = rest.partition("/")
    userinfo, _, hosts = authority.rpartition("@")
    user, _, password = userinfo.partition(":")
    options: dict[str, Any] = {}
    if user:
        options["username"] = unquote(user)
    if password:
        options["password"] = unquote(password)
    return options, hosts, path.partition("?")[0]


def _sentinel_link(url: str, tls: bool, settings: BrokerSettings) -> Link:
    credentials, hosts, path = _credentials(url)
    service, _, database = path.partition("/")
    if not service:
        raise ValueError("a Sentinel URL ends with the service's name: redis+sentinel://HOST:26379/SERVICE")
    options = _options(settings, tls=tls) | credentials | {"db": int(database or 0)}
    if tls:
        options["ssl"] = True
    sentinel_options = _options(settings, tls=tls) | {"socket_timeout": settings.command_timeout_ms / 1000}
    if tls:
        sentinel_options["ssl"] = True
    make_sentinel: Any = Sentinel
    sentinel = make_sentinel(list(_hosts(hosts, 26379)), sentinel_kwargs=sentinel_options)
    pool = sentinel.master_for(service, **options).connection_pool
    return MultiplexedLink(pool.make_connection, settings.command_timeout_ms / 1000)


def _cluster_link(url: str, tls: bool, settings: BrokerSettings) -> Link:
    credentials, hosts, _ = _credentials(url)
    options = _options(settings, tls=tls) | credentials
    for name in ("retry", "retry_on_error"):
        options.pop(name)
    # The map is read for what it says: a shard without a primary is no reason to leave the others alone.
    options |= {"ssl": tls, "retry": Retry(NoBackoff(), 0), "require_full_coverage": False}
    limit_s = settings.command_timeout_ms / 1000
    nodes = [ClusterNode(host, port) for host, port in _hosts(hosts, 6379)]
    return ClusterLink(RedisCluster(startup_nodes=nodes, **(options | {"socket_timeout": limit_s})), limit_s)
