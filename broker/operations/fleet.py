"""The fleet's shared state in Redis: leader lease, registry of workers, known pools, and control messages to
workers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pydantic import ValidationError

from queue_schemas import BadMessage, Control, Pool, SessionId, ShardKeys, WorkerInfo
from queue_schemas.fleet.acting_manager import ActingManager
from queue_schemas.ids import check_name, check_worker_id
from queue_schemas.keys import MANAGER, META, POOLS, SWEEPER, WORKERS, autoscaler_key
from telemetry import get_logger

from ..redis.calls import Caller, pairs

POOL_MEMORY_MS = 24 * 3600 * 1000
"""How long a pool that nobody declared is remembered after its last worker."""
SCALED_MEMORY_MS = 60_000
"""How long an autoscaler counts as responsible for a pool after its last claim."""

_POOL_MEMORY_MS = {"declared": POOL_MEMORY_MS, "seen": POOL_MEMORY_MS, "scaled": SCALED_MEMORY_MS}
_MAX_HELD_BYTES = 4_000
_MAX_DIGITS = 18

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RememberedPools:
    """Pools that were declared (True) or served (False) within a day, and those of them for which an autoscaler is
    responsible now: it starts workers when requests come."""

    known: dict[Pool, bool] = field(default_factory=dict)
    scaled: frozenset[Pool] = frozenset()


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

    async def remember_pools(self, models: Iterable[str], *, declared: bool = False) -> None:
        """Keep pools known for a day from now; Managers and Routers declare theirs again from time to time."""
        now = await self._server_ms()
        kind = "declared" if declared else "seen"
        fields: list[str | int] = []
        for model in models:
            fields += (f"{kind}:{model}", now)
        if fields:
            await self._caller.command(POOLS, "HSET", POOLS, *fields)

    async def known_pools(self) -> dict[Pool, bool]:
        """Pools declared (True) or served (False) within a day; older ones are forgotten."""
        return (await self.remembered_pools()).known

    async def remembered_pools(self) -> RememberedPools:
        """The same, with those for which an autoscaler is responsible."""
        now = await self._server_ms()
        known: dict[Pool, bool] = {}
        scaled: set[Pool] = set()
        for name, when in pairs(await self._caller.once(POOLS, "HGETALL", POOLS)):
            kind, _, model = name.decode("utf-8", "backslashreplace").partition(":")
            # What is no entry of ours is forgotten like an old one.
            is_ours = kind in _POOL_MEMORY_MS and when.isdigit() and _is_name(model)
            if not is_ours or now - int(when[:_MAX_DIGITS]) >= _POOL_MEMORY_MS[kind]:
                await self._caller.once(POOLS, "HDEL", POOLS, name)
            elif kind == "scaled":
                scaled.add(Pool(model))
            else:
                known[Pool(model)] = known.get(Pool(model), False) or kind == "declared"
        return RememberedPools(known, frozenset(scaled))

    async def claim_pool(self, pool: str, autoscaler_id: str, ttl_ms: int) -> bool:
        """Take or keep a pool's autoscaling for ``ttl_ms``, and declare the pool; 0 gives it up. Returns whether it is
        held: one autoscaler holds it at a time."""
        lease = autoscaler_key(pool)
        held = int(await self._caller.script("act_as_manager", lease, autoscaler_id, ttl_ms)) > 0
        if held:
            await self._caller.command(lease, "PEXPIRE", lease, POOL_MEMORY_MS)
            now = await self._server_ms()
            await self._caller.command(POOLS, "HSET", POOLS, f"declared:{pool}", now, f"scaled:{pool}", now)
        elif ttl_ms == 0 and await self._caller.once(lease, "HGET", lease, "until") in (None, b"0"):
            await self._caller.command(POOLS, "HDEL", POOLS, f"scaled:{pool}")
        return held

    async def _server_ms(self) -> int:
        seconds, micros = await self._caller.once(META, "TIME")
        return int(seconds) * 1000 + int(micros) // 1000


def _is_name(model: str) -> bool:
    try:
        check_name(model, "model")
    except BadMessage:
        return False
    return True
