"""What waits and runs, and what happened to jobs so far, as the scripts count it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from queue_schemas import Lane, LaneDepth, Pool, ShardKeys
from queue_schemas.ids import decode_name

from .calls import Caller, pairs


@dataclass(frozen=True, slots=True)
class JobCounts:
    """Counts since ever, by ``(pool, lane, event)``.

    ``events``: ``enqueued``, ``requeued``, ``lost`` and the terminal states. ``stopped``: those cancelled or expired
    once more, with what they were doing: ``cancelled/waiting``, ``cancelled/running``, ``cancelled/router_gone`` (the
    queue found that nobody waits for the answer), ``expired/waiting`` (never started again), ``expired/running``.
    """

    events: dict[tuple[Pool, Lane, str], int] = field(default_factory=dict)
    stopped: dict[tuple[Pool, Lane, str], int] = field(default_factory=dict)


class Figures:
    """The part of :class:`broker.Broker` that counts."""

    _caller: Caller
    _keys: Sequence[ShardKeys]

    async def depths(self) -> dict[Pool, dict[Lane, LaneDepth]]:
        """How much waits and runs, per pool and lane; places with neither are left out."""
        depths: dict[Pool, dict[Lane, LaneDepth]] = {}
        for keys in self._keys:
            for where, waiting, leased, oldest in await self._caller.script("depth", keys.budget, keys.prefix):
                pool, lane, region = _place(where.decode())
                lanes = depths.setdefault(pool, {})
                so_far = lanes.get(lane, LaneDepth())
                by_region = so_far.by_region | ({region: waiting} if region and waiting else {})
                lanes[lane] = LaneDepth(
                    waiting=so_far.waiting + waiting,
                    leased=so_far.leased + leased,
                    oldest_age_ms=max(so_far.oldest_age_ms, oldest),
                    by_region=by_region,
                )
        return depths

    async def totals(self) -> dict[tuple[Pool, Lane, str], int]:
        """What happened to jobs since ever: ``JobCounts.events``."""
        return (await self.job_counts()).events

    async def job_counts(self) -> JobCounts:
        """What happened to jobs since ever, and why they were stopped."""
        counts = JobCounts()
        for keys in self._keys:
            for name, count in pairs(await self._caller.once(keys.totals, "HGETALL", keys.totals)):
                place, _, event = name.decode().rpartition(":")
                pool, lane, _ = _place(place)
                kind = counts.stopped if "/" in event else counts.events
                kind[pool, lane, event] = kind.get((pool, lane, event), 0) + int(count)
        return counts


def _place(where: str) -> tuple[Pool, Lane, str]:
    """Pool, lane and region of a place; the region is empty for places of all."""
    pool, _, rest = where.rpartition(":")
    lane, _, region = rest.partition("@")
    return Pool(decode_name(pool)), Lane(lane), decode_name(region)
