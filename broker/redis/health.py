"""Check that the queue's servers can hold the queue: at the start, and again and again while Routers and Managers run.

What was right at the start may change: a setting is changed under a running fleet, a primary becomes a replica, a disk
fills. :meth:`ServerHealth.faults` returns sentences without addresses, because health pages are public.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from queue_schemas import BrokerUnavailable, BrokerUnsuitable, InferqError, ShardKeys
from telemetry import get_logger

from .calls import Caller
from .durable import waits_for_disk
from .failures import FAILURES, Failure, failure_of
from .server_checks import read_facts, require_suitable
from .shards import on_each

CHECK_TIMEOUT_S = 3.0
"""Limit on finding the server of each shard, and on checking each server; all are checked at the same time."""
REPLICA = "the queue's Redis is a read-only replica; its primary has to be found or made again"
FULL = "the memory of the queue's Redis is full, and it takes no more work; free memory or raise maxmemory"
DISK = "the queue's Redis cannot write to its disk, and takes no more work; look at the disk of that server"
LOADING = "the queue's Redis is loading its data, and answers when that is done"
AWAY = "the queue's Redis cannot be reached"
REFUSING = "the queue's Redis refuses to be written to; its log says why"

log = get_logger(__name__)


class ServerHealth:
    """Checks the server of every shard. ``disk``: work has to be on its disk before it counts as enqueued."""

    def __init__(self, caller: Caller, keys: Sequence[ShardKeys], *, disk: bool) -> None:
        self._caller = caller
        self._keys = keys
        self._disk = disk
        self._known: dict[str, str] = {}

    async def faults(self) -> list[str]:
        """Why the queue cannot be relied on now, in sentences; empty if it can.

        A server that does not work is logged, and reported only once no server works: the others go on serving. A
        server that would lose jobs is reported at once. Full memory is never reported: new work is refused with a
        sentence, while running work finishes and answers are read.
        """
        nodes = await _shard_of_each_node(self._caller, self._keys, CHECK_TIMEOUT_S)
        found = dict(zip(nodes, await asyncio.gather(*map(self._check, nodes.values())), strict=True))
        for node, (fault, _) in found.items():
            if fault != self._known.get(node, ""):
                shard = nodes[node].shard
                if fault:
                    log.error("queue_server_unhealthy", shard=shard, node=node, fault=fault)
                else:
                    log.warning("queue_server_recovered", shard=shard, node=node)
        self._known = {node: fault for node, (fault, _) in found.items()}
        unsafe = [fault for fault, is_unsafe in found.values() if fault and is_unsafe]
        if unsafe or not all(fault for fault, _ in found.values()):
            return list(dict.fromkeys(unsafe))
        return list(dict.fromkeys(fault for fault, _ in found.values() if fault != FULL))

    async def _check(self, keys: ShardKeys) -> tuple[str, bool]:
        """What is wrong with the server of a shard, and whether that can lose jobs rather than only stop work."""
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
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
            return _sentence_of(error.__cause__ or error), False
        except FAILURES as error:
            return _sentence_of(error), False
        return "", False


_SENTENCES = {
    Failure.READ_ONLY: REPLICA,
    Failure.MEMORY_FULL: FULL,
    Failure.DISK_FAILED: DISK,
    Failure.LOADING: LOADING,
    Failure.WRITES_REFUSED: REFUSING,
}


def _sentence_of(error: BaseException) -> str:
    """Why a server did not accept a write, for a health page."""
    return _SENTENCES.get(failure_of(error), AWAY)


async def _shard_of_each_node(
    caller: Caller, keys: Sequence[ShardKeys], timeout_s: float | None
) -> dict[str, ShardKeys]:
    """One shard of each server, by the server's name; servers that are not found within the time share an empty
    name."""

    async def node_of(shard: ShardKeys) -> str:
        try:
            async with asyncio.timeout(timeout_s):
                return await caller.link.node_of(shard.budget)
        except FAILURES:
            return ""

    nodes: dict[str, ShardKeys] = {}
    for name, shard in zip(await asyncio.gather(*map(node_of, keys)), keys, strict=True):
        nodes.setdefault(name, shard)
    return nodes


async def check_servers(caller: Caller, keys: Sequence[ShardKeys], *, disk: bool) -> bool:
    """Check the server of every shard at the start, and log what is allowed but unwise. Returns whether work has to
    wait for WAITAOF.

    Raises ``BrokerUnsuitable`` for a server that cannot hold the queue, ``BrokerUnavailable`` if none answers; those
    that do not answer are checked again later.
    """
    shards = list((await _shard_of_each_node(caller, keys, None)).values())
    waits, answered, away = False, False, BrokerUnavailable(AWAY, retry_after_s=2)
    concerns: dict[str, None] = {}
    for shard, facts in zip(shards, await on_each(shards, lambda shard: read_facts(caller, shard.budget)), strict=True):
        if isinstance(facts, BrokerUnavailable):
            log.warning("queue_server_not_checked", shard=shard.shard, error=facts.message)
            away = facts
            continue
        if isinstance(facts, InferqError):
            raise facts
        answered = True
        require_suitable(facts)
        waits = (disk and waits_for_disk(facts)) or waits
        concerns |= dict.fromkeys(facts.concerns)
    if not answered:
        raise away
    for concern in concerns:
        log.warning("broker_concern", concern=concern)
    return waits
