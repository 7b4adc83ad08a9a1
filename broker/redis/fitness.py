"""Whether the queue's servers are still fit to carry it, asked again and again while Routers and Managers run.

What was right at the start may not stay so: a setting is changed under a running fleet, a primary is made a replica, a
disk fills. :meth:`Fitness.faults` answers sentences without addresses, for anybody may read a health page.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from redis.exceptions import BusyLoadingError, OutOfMemoryError, ReadOnlyError

from queue_schemas import BrokerUnavailable, BrokerUnsuitable, InferqError, ShardKeys
from telemetry import get_logger

from .calls import Caller
from .durable import waits_for_disk
from .failures import FAILURES
from .server_checks import read_facts, require_suitable

LOOK_LIMIT_S = 3.0
"""Limit on asking one server."""
REPLICA = "the queue's Redis is a read-only replica; its primary has to be found or made again"
FULL = "the memory of the queue's Redis is full, and it takes no more work; free memory or raise maxmemory"
DISK = "the queue's Redis cannot write to its disk, and takes no more work; look at the disk of that server"
LOADING = "the queue's Redis is loading its data, and answers when that is done"
AWAY = "the queue's Redis cannot be reached"
REFUSING = "the queue's Redis refuses to be written to; its log says why"

log = get_logger(__name__)


class Fitness:
    """Looks at the server of every shard. ``disk``: work has to be on its disk before it is taken in."""

    def __init__(self, caller: Caller, keys: Sequence[ShardKeys], *, disk: bool) -> None:
        self._caller = caller
        self._keys = keys
        self._disk = disk
        self._known: dict[str, str] = {}

    async def faults(self) -> list[str]:
        """Why the queue cannot be relied on now, in sentences; empty: it can. A server that cannot work is logged, and
        counts only once none can: the others go on. One that would lose or forget jobs counts at once. Full memory
        never counts: new work is refused with a sentence, while running work ends and answers are read as ever."""
        nodes: dict[str, ShardKeys] = {}
        for keys in self._keys:
            nodes.setdefault(await self._node_of(keys), keys)
        found = dict(zip(nodes, await asyncio.gather(*map(self._look, nodes.values())), strict=True))
        for node, (fault, _) in found.items():
            if fault != self._known.get(node, ""):
                shard = nodes[node].shard
                if fault:
                    log.error("queue_server_unfit", shard=shard, node=node, fault=fault)
                else:
                    log.warning("queue_server_fit_again", shard=shard, node=node)
        self._known = {node: fault for node, (fault, _) in found.items()}
        unsafe = [fault for fault, is_unsafe in found.values() if fault and is_unsafe]
        if unsafe or not all(fault for fault, _ in found.values()):
            return list(dict.fromkeys(unsafe))
        return list(dict.fromkeys(fault for fault, _ in found.values() if fault != FULL))

    async def _node_of(self, keys: ShardKeys) -> str:
        try:
            async with asyncio.timeout(LOOK_LIMIT_S):
                return await self._caller.link.node_of(keys.budget)
        except FAILURES:
            return ""

    async def _look(self, keys: ShardKeys) -> tuple[str, bool]:
        """What is wrong with the server of a shard, and whether that loses jobs rather than stops work."""
        try:
            async with asyncio.timeout(LOOK_LIMIT_S):
                facts = await read_facts(self._caller, keys.budget)
                if facts.role not in ("master", "primary"):
                    return REPLICA, False
                require_suitable(facts)
                if self._disk:
                    waits_for_disk(facts)
                self._caller.round_trips += 1
                await self._caller.link.command(keys.synced, "SET", keys.synced, "")
        except BrokerUnsuitable as error:
            return error.message, True
        except InferqError as error:
            return _of(error.__cause__ or error), False
        except FAILURES as error:
            return _of(error), False
        return "", False


def _of(error: BaseException) -> str:
    """What a server says that was asked for a write."""
    text = str(error)
    if isinstance(error, ReadOnlyError):
        return REPLICA
    if isinstance(error, OutOfMemoryError) or "OOM" in text:
        return FULL
    if "MISCONF" in text:
        return DISK
    if isinstance(error, BusyLoadingError):
        return LOADING
    if "NOREPLICAS" in text or "MASTERDOWN" in text:
        return REFUSING
    return AWAY


async def vet(caller: Caller, keys: Sequence[ShardKeys], *, disk: bool) -> bool:
    """At the start: look at the server of every shard, and log what is allowed but unwise. Whether work has to wait for
    WAITAOF. Raises ``BrokerUnsuitable`` for the first that cannot carry the queue, ``BrokerUnavailable`` if none
    answers; those that do not answer are looked at again later."""
    nodes: dict[str, ShardKeys] = {}
    for shard in keys:
        try:
            nodes.setdefault(await caller.link.node_of(shard.budget), shard)
        except FAILURES:
            nodes.setdefault("", shard)
    waits, answered, away = False, False, BrokerUnavailable(AWAY, retry_after_s=2)
    concerns: dict[str, None] = {}
    for shard in nodes.values():
        try:
            facts = await read_facts(caller, shard.budget)
        except BrokerUnavailable as error:
            log.warning("queue_server_not_vetted", shard=shard.shard, error=error.message)
            away = error
            continue
        answered = True
        require_suitable(facts)
        waits = (disk and waits_for_disk(facts)) or waits
        concerns |= dict.fromkeys(facts.concerns)
    if not answered:
        raise away
    for concern in concerns:
        log.warning("broker_concern", concern=concern)
    return waits
