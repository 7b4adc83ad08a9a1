"""Persisted jobs: get one, list a tenant's, delete one, and read the notices of those that finished."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from queue_schemas import (
    BadMessage,
    BadRequest,
    FinishedJob,
    JobId,
    JobMetadata,
    Lane,
    PersistedJob,
    Pool,
    ShardKeys,
    State,
    Tenant,
)
from queue_schemas.ids import decode_name
from queue_schemas.keys import keys_of_job
from telemetry import get_logger

from ..redis.calls import Caller, pairs
from .jobs import state_or_none

MAX_PAGE_JOBS = 100
"""Jobs in one page of a list."""
_LIST_STEP = 64
"""Jobs of a list looked at in one call, whose reply ends early if it grows large."""
_MAX_CALLS = 1_024
"""Calls for one page on one shard."""
_NOTICE_ID = re.compile(r"([0-9]{1,4}):([0-9]{1,20}-[0-9]{1,20})")

log = get_logger(__name__)


class PersistedJobs:
    """The records of persisted jobs."""

    def __init__(self, caller: Caller, keys: Sequence[ShardKeys]) -> None:
        self._caller = caller
        self._keys = keys
        self._dropped: dict[int, int] = {}

    async def get(self, job_id: str) -> PersistedJob | None:
        """A persisted job's status; None if it is unknown or expired. Callers compare its ``tenant`` with theirs."""
        keys = self._keys_of(job_id)
        if keys is None:
            return None
        (fields,) = await self._caller.script("show_persisted", keys.budget, keys.prefix, job_id)
        return _persisted_job(fields) if fields else None

    async def page(
        self, tenant: Tenant, *, after: str = "", limit: int = 20, states: Iterable[State] = ()
    ) -> tuple[list[PersistedJob], str]:
        """A page of a tenant's listed jobs, newest first, behind the one called ``after``; only those in ``states``, if
        any are named. With it the id to go on from: empty, there are no more. Raises ``BadRequest`` if ``after`` is no
        listed job of the tenant."""
        before = ""
        if after:
            last = await self.get(after)
            if last is None or last.tenant != tenant or not last.background:
                raise BadRequest(f"no job {after[:60]!r} found for this API key: leave out after", param="after")
            before = _list_key(last.created_ms, last.id)
        limit, wanted = min(limit, MAX_PAGE_JOBS), frozenset(states)
        found: list[PersistedJob] = []
        looked: list[str] = []  # how far each shard was looked at that was not looked at to its end
        for keys in self._keys:
            jobs, to = await self._list(keys, tenant, before, limit + 1, wanted)
            found += jobs
            looked += [to] if to else []
        found.sort(key=lambda job: _list_key(job.created_ms, job.id), reverse=True)
        # Behind the newest place at which a shard was left there may be more, of that shard, in between.
        least = max(looked, default="")
        page = [job for job in found if _list_key(job.created_ms, job.id) >= least][:limit]
        cut = len(page) < len(found)
        if cut and page:
            return page, page[-1].id
        return page, least[16:]

    async def _list(
        self, keys: ShardKeys, tenant: Tenant, before: str, limit: int, states: frozenset[State]
    ) -> tuple[list[PersistedJob], str]:
        """Up to ``limit`` jobs of a shard, and the position down to which it was searched: empty, to its end."""
        jobs: list[PersistedJob] = []
        key = keys.listed(tenant)
        for _ in range(_MAX_CALLS):
            start = f"({before}" if before else "+"
            members = await self._caller.command(key, "ZREVRANGEBYLEX", key, start, "-", "LIMIT", 0, _LIST_STEP)
            if not members:
                return jobs, ""
            ids = [member.decode()[16:] for member in members]
            found = await self._caller.script("show_persisted", keys.budget, keys.prefix, *ids)
            for member, fields in zip(members, found, strict=False):
                if len(jobs) >= limit:
                    return jobs, before
                job = _persisted_job(fields) if fields else None
                if job is None or job.tenant != tenant or not job.background:
                    await self._caller.command(key, "ZREM", key, member)
                elif not states or job.state in states:
                    jobs.append(job)
                before = member.decode()
            if len(found) == len(members) < _LIST_STEP:
                return jobs, ""
        return jobs, before

    async def delete(self, job_id: str, reason: str) -> State | None:
        """Delete a persisted job and its output; a live job is cancelled first. Returns the state it was in,
        None if it is unknown."""
        keys = self._keys_of(job_id)
        if keys is None:
            return None
        return state_or_none(await self._caller.script("delete_persisted", keys.budget, keys.prefix, job_id, reason))

    async def read_finished(self, limit: int = 100) -> list[FinishedJob]:
        """Notices of ends that have not been forgotten, oldest first by shard, up to ``limit`` a shard. Who has dealt
        with one calls :meth:`acknowledge_finished`: until then it is read again, also by others. At most 100,000 are
        kept a shard; how many were dropped unread is logged."""
        notices: list[FinishedJob] = []
        for keys in self._keys:
            entries = await self._caller.command(keys.finished, "XRANGE", keys.finished, "-", "+", "COUNT", limit)
            for entry_id, fields in entries:
                notice = _notice(keys.shard, entry_id.decode(), dict(pairs(fields)))
                if notice is None:
                    await self._caller.command(keys.finished, "XDEL", keys.finished, entry_id)
                else:
                    notices.append(notice)
            if entries:
                await self._note_dropped(keys)
        return notices

    async def acknowledge_finished(self, notice_ids: Iterable[str]) -> int:
        """Remove notices that were dealt with, by :attr:`~queue_schemas.FinishedJob.id`; how many there were."""
        by_shard: dict[int, list[str]] = {}
        for notice_id in notice_ids:
            match = _NOTICE_ID.fullmatch(notice_id)
            if match is None or int(match[1]) >= len(self._keys):
                raise BadRequest(f"{notice_id[:60]!r} is not the id of a notice")
            by_shard.setdefault(int(match[1]), []).append(match[2])
        removed = 0
        for shard, entries in by_shard.items():
            key = self._keys[shard].finished
            removed += int(await self._caller.command(key, "XDEL", key, *entries))
        return removed

    async def _note_dropped(self, keys: ShardKeys) -> None:
        dropped = int(await self._caller.command(keys.finished_dropped, "HGET", keys.finished_dropped, "dropped") or 0)
        before = self._dropped.get(keys.shard, 0)
        if dropped > before:
            log.warning("notices_dropped", shard=keys.shard, dropped=dropped - before, why="nobody read them in time")
        self._dropped[keys.shard] = dropped

    def _keys_of(self, job_id: str) -> ShardKeys | None:
        """The keys of a job's shard; None for an id that is not one of ours."""
        try:
            return keys_of_job(self._keys, job_id)
        except BadMessage:
            return None


def _list_key(at_ms: int, job_id: str) -> str:
    """A job's sort key in its tenant's list, as the scripts write it."""
    return f"{at_ms:015d} {job_id}"


def _persisted_job(fields: Sequence[Any]) -> PersistedJob:
    """A job from the ``fields`` that ``show_persisted.lua`` returns."""
    words = [value.decode("utf-8", "replace") for value in fields[:-1]]
    (
        job_id, now, tenant, state, epoch, attempts, pool, lane, at, deadline, started, ended_at, expires_at, cause,
        listed, topic, persisted_bytes, output_epoch, output_replaced,
    ) = words  # fmt: skip
    ended_as = State(state)
    return PersistedJob(
        id=JobId(job_id),
        tenant=Tenant(decode_name(tenant)),
        model=Pool(decode_name(pool)),
        lane=Lane(lane.partition("@")[0] or Lane.INTERACTIVE),
        state=ended_as,
        epoch=int(epoch),
        attempts=int(attempts or 0),
        now_ms=int(now),
        created_ms=int(at or 0),
        deadline_ms=int(deadline or 0),
        started_ms=int(started) if started else None,
        ended_ms=int(ended_at) if ended_at else None,
        expires_ms=int(expires_at) if expires_at else None,
        cause=cause,
        background=listed == "1",
        topic=topic,
        persisted_bytes=int(persisted_bytes or 0),
        output_epoch=int(output_epoch or 0),
        output_replaced=output_replaced == "1",
        metadata=_metadata(fields[-1]),
    )


def _metadata(data: bytes) -> JobMetadata:
    try:
        return JobMetadata.unpack(data)
    except BadMessage as error:
        log.warning("job_metadata_unreadable", error=error.message)
        return JobMetadata()


def _notice(shard: int, entry_id: str, fields: dict[bytes, bytes]) -> FinishedJob | None:
    try:
        return FinishedJob(
            id=f"{shard}:{entry_id}",
            job_id=JobId(fields[b"id"].decode()),
            tenant=Tenant(decode_name(fields[b"tenant"].decode())),
            state=State(fields[b"state"].decode()),
            topic=fields[b"topic"].decode(),
            at_ms=int(entry_id.partition("-")[0]),
        )
    except (KeyError, ValueError) as error:
        log.warning("notice_unreadable", entry=entry_id, error=str(error), then="it is passed over")
        return None
