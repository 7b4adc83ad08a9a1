"""``ClusterLink`` sends commands to a Redis Cluster whose nodes fail separately.

Each node has a connection of its own, and the slot map is read beside the commands, so that a node that is away delays
only the commands for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.exceptions import AskError, MovedError
from redis.exceptions import ConnectionError as RedisConnectionError

from .failures import UNREACHABLE
from .multiplexer import KeyedConnections, MultiplexedConnection

_REFRESH_GAP_S = 0.25


class ClusterLink:
    """Sends each command to the node that holds its key. redis-py reads the map of slots and makes the connections."""

    def __init__(self, topology: RedisCluster, command_limit_s: float) -> None:
        self._topology = topology
        self._limit_s = command_limit_s
        self._shared: dict[str, MultiplexedConnection] = {}
        self._readers = KeyedConnections()
        self._pipelines = KeyedConnections()
        self._refreshing: asyncio.Task[None] | None = None
        self._known = False

    async def command(self, key: str, *args: Any) -> Any:
        try:
            return await self._to_node(await self._node(key)).command(self._limit_s, *args)
        except MovedError:
            await self._refresh()
            return await self._to_node(await self._node(key)).command(self._limit_s, *args)
        except AskError as asked:
            return await self._ask(asked, args)
        except UNREACHABLE:
            self._refresh()
            raise

    async def _ask(self, asked: AskError, args: tuple[Any, ...]) -> Any:
        """The key's slot is being moved: this one command goes to where it is going."""
        node = self._topology.get_node(node_name=f"{asked.host}:{asked.port}")
        if node is None:
            self._refresh()
            raise RedisConnectionError(f"the key's slot is on its way to a node that is not known yet: {asked}")
        _, reply = await self._to_node(node).pipeline(self._limit_s, [("ASKING",), args])
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def blocking(self, key: str, limit_s: float, *args: Any) -> Any:
        node = await self._node(key)
        try:
            return await self._readers.blocking(
                key, node.name, lambda: self._open(node), limit_s + self._limit_s, *args
            )
        except (MovedError, AskError):
            self._refresh()
            raise
        except UNREACHABLE:
            self._refresh()
            raise

    async def pipeline(self, key: str, limit_s: float, commands: Sequence[Sequence[Any]]) -> list[Any]:
        node = await self._node(key)
        connection = await self._pipelines.at(key, node.name, lambda: self._open(node))
        try:
            replies = await connection.pipeline(limit_s + self._limit_s, commands)
        except UNREACHABLE:
            await self._refresh()
            raise
        moved = next((reply for reply in replies if isinstance(reply, (MovedError, AskError))), None)
        if moved is not None:
            await self._refresh()
            raise RedisConnectionError(f"the key's slot is on another node, or on its way there: {moved}")
        return replies

    async def forget(self, key: str) -> None:
        await self._readers.forget(key)

    async def node_of(self, key: str) -> str:
        return (await self._node(key)).name

    async def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        await asyncio.gather(*(connection.close() for connection in self._shared.values()))
        await asyncio.gather(self._readers.close(), self._pipelines.close())
        await self._topology.nodes_manager.aclose()
        await self._topology.nodes_manager.aclose("startup_nodes")

    async def _node(self, key: str) -> ClusterNode:
        if not self._known:
            await self._refresh()
        node = self._topology.get_node_from_key(key)
        if node is None:
            raise RedisConnectionError("no node of the cluster holds this key's slot now")
        return node

    def _to_node(self, node: ClusterNode) -> MultiplexedConnection:
        if node.name not in self._shared:
            self._shared[node.name] = self._open(node)
        return self._shared[node.name]

    def _open(self, node: ClusterNode) -> MultiplexedConnection:
        return MultiplexedConnection(lambda: node.connection_class(**node.connection_kwargs), self._limit_s)

    def _refresh(self) -> asyncio.Future[None]:
        """Read the map of slots again, unless that is being done; await the answer to know that it was read."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._read_map())
            self._refreshing.add_done_callback(_seen)
        return asyncio.shield(self._refreshing)

    async def _read_map(self) -> None:
        began = time.monotonic()
        try:
            await self._topology.nodes_manager.initialize()
            self._known = True
            names = {node.name for node in self._topology.get_nodes()}
            gone = [self._shared.pop(name) for name in list(self._shared) if name not in names]
            await asyncio.gather(*(connection.close() for connection in gone))
        finally:
            # However many commands fail, nodes are asked no more often than this.
            if self._known:
                await asyncio.sleep(max(0.0, began + _REFRESH_GAP_S - time.monotonic()))


def _seen(task: asyncio.Task[None]) -> None:
    """Marks the error as retrieved; callers that await the task got it."""
    if not task.cancelled():
        task.exception()
