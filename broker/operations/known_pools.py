"""The pools that are known: declared by settings or an autoscaler, or served by a worker lately."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from queue_schemas import BadMessage, Pool
from queue_schemas.ids import check_name
from queue_schemas.keys import META, POOLS, autoscaler_key

from ..redis.calls import Caller, pairs

POOL_MEMORY_MS = 24 * 3600 * 1000
"""How long a pool that nobody declared is remembered after its last worker."""
SCALED_MEMORY_MS = 60_000
"""How long an autoscaler counts as responsible for a pool after its last claim."""

_POOL_MEMORY_MS = {"declared": POOL_MEMORY_MS, "seen": POOL_MEMORY_MS, "scaled": SCALED_MEMORY_MS}
_MAX_DIGITS = 18


@dataclass(frozen=True, slots=True)
class RememberedPools:
    """Pools that were declared (True) or served (False) within a day, and those of them for which an autoscaler is
    responsible now: it starts workers when requests come."""

    known: dict[Pool, bool] = field(default_factory=dict)
    scaled: frozenset[Pool] = frozenset()


class KnownPools:
    """What Managers, Routers and autoscalers write of pools, and all of them read."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    async def remember(self, models: Iterable[str], *, declared: bool = False) -> None:
        """Keep pools known for a day from now; Managers and Routers declare theirs again from time to time."""
        now = await self._server_ms()
        kind = "declared" if declared else "seen"
        fields: list[str | int] = []
        for model in models:
            fields += (f"{kind}:{model}", now)
        if fields:
            await self._caller.command(POOLS, "HSET", POOLS, *fields)

    async def remembered(self) -> RememberedPools:
        """Pools declared or served within a day, and those that an autoscaler answers for; older ones are forgotten."""
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

    async def claim(self, pool: str, autoscaler_id: str, ttl_ms: int) -> bool:
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
