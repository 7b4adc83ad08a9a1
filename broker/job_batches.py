"""The calls that every job makes, batched: enqueue, settle and release of one shard."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from queue_schemas import Job, Lease, Outcome, OverCapacity, Settled, ShardKeys, State
from queue_schemas.ids import encode_name

from .batching import Batcher
from .calls import Caller
from .settings import Budgets

_OVERHEAD_BYTES = 256
"""What a job costs in a call besides its own bytes, roughly."""


@dataclass(frozen=True, slots=True)
class _Enqueue:
    job: Job
    envelope: bytes


@dataclass(frozen=True, slots=True)
class _Settle:
    lease: Lease
    outcome: Outcome
    frames: bytes


@dataclass(frozen=True, slots=True)
class _Release:
    lease: Lease
    reason: str
    counted: bool


class ShardBatches:
    """Concurrent calls of one kind on one shard share a script call. Answers are those of :class:`broker.Broker`."""

    def __init__(self, caller: Caller, keys: ShardKeys, budgets: Budgets) -> None:
        self._caller = caller
        self._keys = keys
        self._budgets = budgets
        self._enqueues = Batcher(self._send_enqueues, lambda item: len(item.envelope) + _OVERHEAD_BYTES)
        self._settles = Batcher(self._send_settles, lambda item: len(item.frames) + _OVERHEAD_BYTES)
        self._releases = Batcher(self._send_releases, lambda item: len(item.reason) + _OVERHEAD_BYTES)

    async def enqueue(self, job: Job) -> State:
        return await self._enqueues.submit(_Enqueue(job, job.pack()))

    async def settle(self, lease: Lease, outcome: Outcome, frames: bytes) -> Settled:
        return await self._settles.submit(_Settle(lease, outcome, frames))

    async def release(self, lease: Lease, reason: str, counted: bool) -> Settled:
        return await self._releases.submit(_Release(lease, reason, counted))

    async def close(self) -> None:
        """Stop; calls under way are cancelled."""
        await asyncio.gather(self._enqueues.close(), self._settles.close(), self._releases.close())

    async def _send_enqueues(self, items: Sequence[_Enqueue]) -> list[State | Exception]:
        limits = self._budgets
        args: list[Any] = [limits.tenant_jobs, limits.tenant_bytes, limits.pool_jobs, limits.pool_bytes]
        for item in items:
            job = item.job
            args += (
                job.id, item.envelope, encode_name(job.model), job.lane.value, job.band, encode_name(job.tenant),
                job.reply_to, int(job.stored), job.ttl_ms, job.max_attempts,
                encode_name(job.region), job.patience_ms, int(_is_continued(job)),
            )  # fmt: skip
        answers = await self._run("enqueue", args, wait_when_full=False)
        return [_enqueued(answer.decode(), item.job) for answer, item in zip(answers, items, strict=True)]

    async def _send_settles(self, items: Sequence[_Settle]) -> list[Settled | Exception]:
        args: list[Any] = []
        for item in items:
            args += (*attempt_of(item.lease), item.outcome.value, item.frames)
        return [Settled(answer.decode()) for answer in await self._run("settle", args)]

    async def _send_releases(self, items: Sequence[_Release]) -> list[Settled | Exception]:
        args: list[Any] = []
        for item in items:
            args += (*attempt_of(item.lease), int(item.counted), item.reason)
        return [Settled(answer.decode()) for answer in await self._run("release", args)]

    async def _run(self, script: str, args: list[Any], *, wait_when_full: bool = True) -> list[bytes]:
        keys = self._keys
        answers: list[bytes] = await self._caller.script(
            script, keys.budget, keys.prefix, *args, wait_when_full=wait_when_full
        )
        return answers


def attempt_of(lease: Lease) -> tuple[str, int, str]:
    """What names an attempt in a call of it."""
    return lease.job.id, lease.epoch, lease.attempt_id


def _is_continued(job: Job) -> bool:
    """Whether a lost attempt of ``job`` waits for the Router to say what was delivered."""
    return job.on_loss == "continue" and job.stream and not job.stored and bool(job.reply_to)


_BUDGET_SENTENCES = {
    "tenant_jobs": "your account has too many requests waiting or running",
    "tenant_bytes": "your account has too many bytes of requests waiting or running",
    "pool_jobs": "too many requests wait for model {model}",
    "pool_bytes": "too many bytes of requests wait for model {model}",
}


def _enqueued(answer: str, job: Job) -> State | Exception:
    if answer.startswith("over "):
        sentence = _BUDGET_SENTENCES[answer.removeprefix("over ")].format(model=job.model)
        return OverCapacity(f"{sentence}; try again when some have finished", retry_after_s=2)
    return State(answer)
