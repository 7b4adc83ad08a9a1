"""Queue depths and job counts, as the scripts keep them, for metrics and for Managers that assign work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from queue_schemas import BrokerUnavailable, InferqError, Lane, LaneDepth, Pool, ShardKeys
from queue_schemas.ids import decode_name
from scheduling.prediction import LaneState, Rate, place_of

from ..redis.calls import Caller, pairs
from ..redis.shards import answers_of, on_each

_NOT_EVENTS = ("waiting", "leased", "turn", "wait", "cost", "ran", "ran_ms", "ran_cost")
SHARD_TIMEOUT_S = 1.0
"""How long a shard may take to answer before it is left out."""


@dataclass(frozen=True, slots=True)
class JobCounts:
    """Counts since ever, by ``(pool, lane, event)``.

    ``events``: ``enqueued``, ``requeued``, ``lost`` and the terminal states. ``stopped``: those cancelled or expired
    once more, with what they were doing: ``cancelled/waiting``, ``cancelled/running``, ``cancelled/router_gone`` (the
    queue found that nobody waits for the answer), ``expired/waiting`` (never started again), ``expired/running``.
    ``affinity``: jobs that were leased, by whether their worker held their prefix: ``warm``, ``cold``, or ``none``, of
    one without a prefix worth finding.
    """

    events: dict[tuple[Pool, Lane, str], int] = field(default_factory=dict)
    stopped: dict[tuple[Pool, Lane, str], int] = field(default_factory=dict)
    affinity: dict[tuple[Pool, Lane, str], int] = field(default_factory=dict)


class QueueStats:
    """Depths and counts over all shards."""

    def __init__(self, caller: Caller, keys: Sequence[ShardKeys]) -> None:
        self._caller = caller
        self._keys = keys

    async def depths(self, away: set[int] | None = None) -> dict[Pool, dict[Lane, LaneDepth]]:
        """How much waits and runs, per pool and lane; lanes with neither are left out. With ``away``, shards that do
        not answer within a second are added to it, and their pools left out, as long as one answers."""
        depths: dict[Pool, dict[Lane, LaneDepth]] = {}
        rates: dict[Pool, dict[Lane, Rate]] = {}

        async def ask(keys: ShardKeys) -> Any:
            return await self._caller.script("depth", keys.budget, keys.prefix, retry=away is None)

        for found in await self._ask_each(ask, away):
            for queue_key, waiting, leased, oldest, cost, *rate, left in found:
                pool, lane, region = _parts(queue_key.decode())
                lanes = depths.setdefault(pool, {})
                so_far = lanes.get(lane, LaneDepth())
                by_region = so_far.by_region | ({region: waiting} if region and waiting else {})
                lanes[lane] = LaneDepth(
                    waiting=so_far.waiting + waiting,
                    leased=so_far.leased + leased,
                    oldest_age_ms=max(so_far.oldest_age_ms, oldest),
                    by_region=by_region,
                    cost=so_far.cost + cost,
                    deadline_ms=min((ms for ms in (so_far.deadline_ms, left) if type(ms) is int), default=None),
                )
                rates.setdefault(pool, {})[lane] = Rate(*rate)
        for pool, lanes in depths.items():
            states = {
                lane: LaneState(depth.waiting, depth.cost, depth.leased, rates[pool][lane])
                for lane, depth in lanes.items()
            }
            depths[pool] = {lane: _predicted(depth, lane, states) for lane, depth in lanes.items()}
        return depths

    async def job_counts(self, away: set[int] | None = None) -> JobCounts:
        """Counts of job events and of stopped jobs, since the data was created; ``away`` as for :meth:`depths`."""
        counts = JobCounts()

        async def ask(keys: ShardKeys) -> Any:
            return await self._caller.once(keys.counters, "HGETALL", keys.counters)

        for found in await self._ask_each(ask, away):
            for name, count in pairs(found):
                queue_key, _, event = name.decode().rpartition(":")
                if event in _NOT_EVENTS:
                    continue
                pool, lane, _ = _parts(queue_key)
                kind = counts.stopped if "/" in event else counts.events
                if event.startswith("affinity/"):
                    kind, event = counts.affinity, event.removeprefix("affinity/")
                kind[pool, lane, event] = kind.get((pool, lane, event), 0) + int(count)
        return counts

    async def _ask_each(self, ask: Callable[[ShardKeys], Awaitable[Any]], away: set[int] | None) -> list[Any]:
        """The answers of the shards; see :meth:`depths`."""
        if away is None:
            return answers_of(await on_each(self._keys, ask))

        async def within_limit(keys: ShardKeys) -> Any:
            try:
                async with asyncio.timeout(SHARD_TIMEOUT_S):
                    return await ask(keys)
            except TimeoutError as error:
                raise BrokerUnavailable("a part of the queue's Redis does not answer", retry_after_s=2) from error

        found = await on_each(self._keys, within_limit)
        present = [answer for answer in found if not isinstance(answer, InferqError)]
        if not present:
            return answers_of(found)
        silent = zip(self._keys, found, strict=True)
        away |= {keys.shard for keys, answer in silent if isinstance(answer, InferqError)}
        return present


def _predicted(depth: LaneDepth, lane: Lane, states: Mapping[Lane, LaneState]) -> LaneDepth:
    """The depth of a lane with the wait of a job that comes now, behind all that waits there."""
    rate = states[lane].rate
    return depth.model_copy(
        update={
            "predicted_wait_ms": place_of(states, lane, depth.waiting, 1).wait_ms,
            "ms_per_cost": round(rate.run_ms / rate.cost, 3) if rate.cost else None,
        }
    )


def _parts(queue_key: str) -> tuple[Pool, Lane, str]:
    """Pool, lane and region of a queue key; the region is empty for one of all."""
    pool, _, rest = queue_key.rpartition(":")
    lane, _, region = rest.partition("@")
    return Pool(decode_name(pool)), Lane(lane), decode_name(region)
