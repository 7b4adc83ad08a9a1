"""Queue depths and job counts, for metrics and for Managers that assign work.

Scripts keep the counts. The sweep notes how many jobs came of late, and how long they have waited (:class:`Survey`):
who reads depths looks at no job and no tenant.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from queue_schemas import BrokerFull, BrokerUnavailable, InferqError, Lane, LaneDepth, Pool, ShardKeys
from queue_schemas.ids import decode_name, encode_name
from queue_schemas.lanes import BANDS
from scheduling.arrivals import STALE_MS, Arrivals
from scheduling.prediction import RETRIED, LaneState, Rate, place_of
from telemetry import get_logger

from ..redis.calls import Caller, pairs
from ..redis.shards import answers_of, on_each

_NOT_EVENTS = ("waiting", "leased", "turn", "wait", "cost", "ran", "ran_ms", "ran_cost", "ran_at")
_COSTS = (b":r:cost", *(b":%d:cost" % band for band in range(BANDS)))
"""What waits costs: retried jobs, and those of each band."""
SHARD_TIMEOUT_S = 1.0
"""How long a shard may take to answer before it is left out."""
MAX_KEYS = 128
"""Queue keys that a sweep surveys at most; with more, they take turns."""
MAX_HEADS = 512
"""Tenants of a band whose first jobs a sweep looks at, over all these queue keys."""

log = get_logger(__name__)


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
        """How much waits and runs, per pool and lane; lanes with neither are left out. How long the oldest job has
        waited, until the earliest deadline, and how many came of late, is as the last sweep found it. With ``away``,
        shards that do not answer within a second are added to it, and their pools left out, as long as one answers."""
        depths: dict[Pool, dict[Lane, LaneDepth]] = {}
        read = self._caller.command if away is None else self._caller.once

        async def ask(keys: ShardKeys) -> Any:
            hashes = (keys.counters, keys.heads, keys.arrivals)  # all in one round trip
            return await asyncio.gather(
                *(read(key, "HGETALL", key) for key in hashes), read(keys.clock, "GET", keys.clock)
            )

        shards: dict[Pool, list[_Paces]] = {}  # at which a pool has jobs: one, unless their number has changed
        for counted, heads, looks, clock in await self._ask_each(ask, away):
            counts = dict(pairs(counted))
            first = dict(pairs(heads))
            paces = _Paces(counts, dict(pairs(looks)), clock)
            for queue_key in {name.rpartition(b":")[0] for name in counts if name.endswith((b":waiting", b":leased"))}:
                waiting, leased = (int(counts.get(queue_key + kind, 0)) for kind in (b":waiting", b":leased"))
                if not (waiting or leased):
                    continue
                cost = sum(max(int(counts.get(queue_key + kind, 0)), 0) for kind in _COSTS)
                pool, lane, region = _parts(queue_key.decode())
                lanes = depths.setdefault(pool, {})
                at = shards.setdefault(pool, [])
                if paces not in at[-1:]:
                    at.append(paces)
                so_far = lanes.get(lane, LaneDepth())
                by_region = so_far.by_region | ({region: waiting} if region and waiting else {})
                oldest, left = _head(first.get(queue_key)) if waiting else (0, None)
                lanes[lane] = LaneDepth(
                    waiting=so_far.waiting + waiting,
                    leased=so_far.leased + leased,
                    oldest_age_ms=max(so_far.oldest_age_ms, oldest),
                    by_region=by_region,
                    cost=so_far.cost + cost,
                    deadline_ms=min((ms for ms in (so_far.deadline_ms, left) if ms is not None), default=None),
                )
        return {pool: _with_paces(pool, lanes, shards[pool]) for pool, lanes in depths.items()}

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


@dataclass(slots=True)
class _Round:
    """Where a round through the streams of a queue key stands. Times are the queue's, in ms; None: no job was found.
    ``shown``: of the last whole round, or the first one so far."""

    passed: int = 0
    since: int | None = None
    due: int | None = None
    shown: tuple[int | None, int | None] | None = None

    def add(self, since: int | None, due: int | None, passed: int, *, is_last: bool) -> None:
        """What was found behind the tenants passed before."""
        self.since = min((at for at in (self.since, since) if at is not None), default=None)
        self.due = min((at for at in (self.due, due) if at is not None), default=None)
        if is_last or self.shown is None:
            self.shown = self.since, self.due
        self.passed += passed
        if is_last:
            self.passed, self.since, self.due = 0, None, None

    def packed(self, now: int) -> str:
        since, due = self.shown or (None, None)
        return f"{max(0, now - since) if since is not None else 0} {max(0, due - now) if due is not None else '-'}"


class Survey:
    """Goes round the first jobs of all waiting streams, a part with each sweep. Notes for each queue key how long the
    longest-waiting one has waited, and until the earliest deadline."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._rounds: dict[int, dict[bytes, _Round]] = {}
        """By shard and queue key, those first whose turn it is."""

    async def go_on(self, keys: ShardKeys, waiting: Sequence[bytes], now: int) -> None:
        """Survey the next part of a shard with jobs at ``waiting`` queue keys. ``now``: the queue's time, ms."""
        before = self._rounds.get(keys.shard)
        if before is None:  # another sweeper may have left queue keys at which nothing waits any more
            before = {key: _Round() for key in await self._caller.once(keys.heads, "HKEYS", keys.heads)}
        known = dict.fromkeys((*before, *waiting))
        still = set(waiting)
        rounds = {key: before.get(key) or _Round() for key in known if key in still}
        self._rounds[keys.shard] = rounds
        if gone := before.keys() - still:
            await self._caller.once(keys.heads, "HDEL", keys.heads, *gone)
        if not rounds:
            return
        looked_at = list(rounds)[:MAX_KEYS]
        tenants = max(1, MAX_HEADS // len(looked_at))
        args = [part for key in looked_at for part in (key, rounds[key].passed)]
        found = await self._caller.script("survey", keys.budget, keys.prefix, tenants, *args)
        shown: list[bytes | str] = []
        for key, (since, due, is_last) in zip(looked_at, found, strict=True):
            one = rounds[key] = rounds.pop(key)
            one.add(int(since) if since else None, int(due) if due else None, tenants, is_last=bool(is_last))
            shown += key, one.packed(now)
        try:
            await self._caller.once(keys.heads, "HSET", keys.heads, *shown)
        except BrokerFull as error:
            log.info("survey_not_written", shard=keys.shard, error=error.message, then="depths show the last one")


def _head(packed: bytes | None) -> tuple[int, int | None]:
    """How long the longest-waiting job has waited, and until the earliest deadline (ms)."""
    age, _, left = (packed or b"0 -").partition(b" ")
    return int(age), None if left == b"-" else int(left)


@dataclass(frozen=True, slots=True, eq=False)
class _Paces:
    """How fast jobs come to a shard and are served there, by ``counts`` and by the ``looks`` of the sweep. ``clock`` is
    the queue's as it was written last."""

    counts: Mapping[bytes, bytes]
    looks: Mapping[bytes, bytes]
    clock: bytes | None

    def rate(self, lane: bytes) -> Rate:
        """Of the jobs of a lane (``<pool>:<lane>``) that ended of late."""
        return Rate(*(int(self.counts.get(lane + kind, 0)) for kind in (b":ran", b":ran_ms", b":ran_cost")))

    def arrivals_per_s(self, lane: bytes) -> float | None:
        """How many jobs come to a lane each second; None if nobody has swept for so long that it is not known."""
        at, now = self.looks.get(b"at"), (self.clock or b"").rpartition(b" ")[2]
        if at is None or not now or abs(int(now) - int(at)) > STALE_MS:  # a look may be a little ahead of it
            return None
        return Arrivals(*map(int, self.looks.get(lane, b"").split())).per_s


def _with_paces(pool: Pool, lanes: Mapping[Lane, LaneDepth], shards: Sequence[_Paces]) -> dict[Lane, LaneDepth]:
    """The depths of a pool's lanes with how fast jobs come and are served, over all shards, and with the wait of a job
    that comes now, behind all that waits there."""
    states, arrivals = {}, {}
    for lane, depth in lanes.items():
        name = f"{encode_name(pool)}:{lane}".encode()
        # One that comes behind all: as if all were retried, and it too.
        costs = (depth.cost, *(0,) * BANDS)
        states[lane] = LaneState(depth.waiting, costs, depth.leased, _sum([one.rate(name) for one in shards]))
        per_s = [one.arrivals_per_s(name) for one in shards]
        arrivals[lane] = None if None in per_s else round(sum(one or 0.0 for one in per_s), 3)
    return {
        lane: depth.model_copy(
            update={
                "predicted_wait_ms": place_of(states, lane, RETRIED, depth.waiting, 1).wait_ms,
                "ms_per_cost": states[lane].rate.ms_per_cost,
                "ms_per_job": states[lane].rate.ms_per_job,
                "arrivals_per_s": arrivals[lane],
            }
        )
        for lane, depth in lanes.items()
    }


def _sum(rates: Sequence[Rate]) -> Rate:
    """All of them together."""
    return Rate(sum(one.jobs for one in rates), sum(one.run_ms for one in rates), sum(one.cost for one in rates))


def _parts(queue_key: str) -> tuple[Pool, Lane, str]:
    """Pool, lane and region of a queue key; the region is empty for one of all."""
    pool, _, rest = queue_key.rpartition(":")
    lane, _, region = rest.partition("@")
    return Pool(decode_name(pool)), Lane(lane), decode_name(region)
