"""The fleet's shared state in Redis: leader lease, registry of workers, and control messages to workers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence

from pydantic import ValidationError

from queue_schemas import BadMessage, Control, SessionId, ShardKeys, WorkerInfo
from queue_schemas.fleet.acting_manager import ActingManager
from queue_schemas.fleet.adapters import adapter_set_of
from queue_schemas.ids import check_worker_id
from queue_schemas.keys import ADAPTERS, MANAGER, SWEEPER, WORKERS
from telemetry import get_logger

from ..redis.calls import Caller, pairs

_MAX_HELD_BYTES = 4_000
_MAX_DIGITS = 18

log = get_logger(__name__)


class Fleet:
    """What Managers write about the fleet, and Routers and workers read."""

    def __init__(self, caller: Caller, keys: Sequence[ShardKeys]) -> None:
        self._caller = caller
        self._keys = keys

    async def acquire_leader_lease(self, manager_id: str, ttl_ms: int, url: str = "", proof: str = "") -> int | None:
        """Take or keep the acting Manager's lease for ``ttl_ms``: its term, or None while another holds it. ``url`` and
        ``proof`` tell the others where the holder is (:mod:`queue_schemas.fleet.acting_manager`)."""
        return int(await self._caller.script("act_as_manager", MANAGER, manager_id, ttl_ms, url, proof)) or None

    async def release_leader_lease(self, manager_id: str) -> None:
        """Release the acting Manager's lease, if held."""
        await self._caller.script("act_as_manager", MANAGER, manager_id, 0)

    async def acquire_sweeper_lease(self, worker: str, ttl_ms: int) -> bool:
        """Take or keep, for ``ttl_ms``, the lease of the one worker that sweeps while no Manager acts; 0 releases it.
        Returns whether it is held. One try."""
        return int(await self._caller.script("act_as_manager", SWEEPER, worker, ttl_ms, retry=False)) > 0

    async def leader_lease_until(self) -> int:
        """When the acting Manager's lease ends, which rises while one acts (server ms, not to be compared with a local
        clock); 0 if there is none or the value is not one of ours. One try."""
        until: bytes = await self._caller.once(MANAGER, "HGET", MANAGER, "until") or b""
        return int(until) if until.isdigit() and len(until) <= _MAX_DIGITS else 0

    async def acting_manager(self) -> ActingManager:
        """The holder of the acting Manager's lease and its claimed address, which the caller must verify. One try."""
        fields = ("holder", "until", "url", "proof")
        held = [value or b"" for value in await self._caller.once(MANAGER, "HMGET", MANAGER, *fields)]
        holder, until, url, proof = (value[:_MAX_HELD_BYTES].decode("utf-8", "replace") for value in held)
        return ActingManager(holder, int(until) if until.isascii() and until.isdigit() else 0, url, proof)

    async def send_control(self, session_id: SessionId, control: Control, shard: int = 0) -> bool:
        """Put a message on a worker's control stream of a shard; False if the worker is gone."""
        key = self._keys[shard].control(session_id)
        fields = [part for pair in control.fields().items() for part in pair]
        return await self._caller.once(key, "XADD", key, "NOMKSTREAM", "*", *fields) is not None

    async def load_workers(self) -> dict[str, WorkerInfo]:
        """The registry as the acting Manager last wrote it; entries that cannot be read are left out."""
        workers: dict[str, WorkerInfo] = {}
        for name, info in pairs(await self._caller.once(WORKERS, "HGETALL", WORKERS)):
            worker_id = name.decode("utf-8", "backslashreplace")
            try:
                workers[check_worker_id(worker_id)] = WorkerInfo.model_validate_json(info)
            except BadMessage as error:
                log.warning("registry_entry_unreadable", error=error.message)
            except ValidationError as error:
                # Of a version that we cannot read: the worker's next heartbeat tells the Manager all that is in it.
                faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()[:3]]
                log.warning("registry_entry_unreadable", worker_id=worker_id, error="; ".join(faults)[:300])
        return workers

    async def save_workers(self, changed: Iterable[WorkerInfo], gone: Iterable[str]) -> None:
        """Write what changed in the registry."""
        fields: list[str | bytes] = []
        for info in changed:
            fields += (info.worker_id, info.model_dump_json())
        if fields:
            await self._caller.command(WORKERS, "HSET", WORKERS, *fields)
        if gone := list(gone):
            await self._caller.command(WORKERS, "HDEL", WORKERS, *gone)

    async def load_adapter_sets(self, names: Collection[str] | None = None) -> dict[str, frozenset[str]]:
        """The sets of adapters of these names (None: all) that the acting Manager wrote; what is not there, or cannot
        be read, is left out."""
        if names is None:
            found = pairs(await self._caller.once(ADAPTERS, "HGETALL", ADAPTERS))
        elif names:
            values = await self._caller.once(ADAPTERS, "HMGET", ADAPTERS, *names)
            found = [(name.encode(), value) for name, value in zip(names, values, strict=True) if value]
        else:
            return {}
        sets: dict[str, frozenset[str]] = {}
        for name, value in found:
            set_name = name.decode("utf-8", "backslashreplace")
            try:
                adapters = frozenset(map(str, json.loads(value)))
                is_whole = adapter_set_of(adapters) == set_name
            except (ValueError, TypeError, RecursionError):
                is_whole = False
            if is_whole:
                sets[set_name] = adapters
            else:
                log.warning("adapter_set_unreadable", name=set_name[:100])
        return sets

    async def save_adapter_sets(self, new: Mapping[str, Iterable[str]], gone: Iterable[str]) -> None:
        """Write the sets of adapters that workers could load, and remove those of none."""
        fields: list[str] = []
        for name, adapters in new.items():
            fields += (name, json.dumps(sorted(adapters), ensure_ascii=False))
        if fields:
            await self._caller.command(ADAPTERS, "HSET", ADAPTERS, *fields)
        if gone := list(gone):
            await self._caller.command(ADAPTERS, "HDEL", ADAPTERS, *gone)
