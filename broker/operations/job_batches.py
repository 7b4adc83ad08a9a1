"""Batch the calls that every job makes on one shard (enqueue, append, settle, release) into shared script calls."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from queue_schemas import (
    Enqueued,
    IdempotencyKeyReused,
    Job,
    JobId,
    Lane,
    Lease,
    Outcome,
    OverCapacity,
    PersistOptions,
    Settled,
    ShardKeys,
    State,
    WaitTooLong,
)
from queue_schemas.frames import split_frames
from queue_schemas.ids import encode_name, random_hex
from queue_schemas.job import MAX_COST, MAX_WEIGHT, MIN_WEIGHT
from queue_schemas.persisted_output import key_digest, request_digest
from queue_schemas.records import record

from ..batching import Batcher
from ..redis.calls import Caller
from ..settings import Budgets

_ATTEMPT_BASE = 5
"""Where the base of attempt ids stands among the arguments of ``enqueue``."""
MAX_FIGURE = 10**9
"""No attempt costs more, or runs for longer (ms)."""
_OVERHEAD_BYTES = 256
"""What a job costs in a call besides its own bytes, roughly."""
DEFAULT_RETENTION_MS = 24 * 3600 * 1000
"""How long a persisted job's answer is kept unless its Router says otherwise."""


@record
class _Enqueue:
    job: Job
    envelope: bytes
    listener: str
    options: PersistOptions
    metadata: bytes
    patience_ms: int | None


@record
class _Output:
    """What an attempt put out, and how it ended; None while it goes on."""

    lease: Lease
    outcome: Outcome | None
    frames: bytes
    used: int | None = None
    run_ms: int | None = None


@record
class _Release:
    lease: Lease
    reason: str
    ending: int | str
    """0: not counted; 1: avoided as long as usual; more: for so many ms; ``yielded``."""
    envelope: bytes = b""
    """Of the next attempt of a job that yielded; empty: it is the same."""


class ShardBatches:
    """Concurrent calls of one kind on one shard share a script call. Answers are those of :class:`broker.Broker`."""

    def __init__(self, caller: Caller, keys: ShardKeys, budgets: Budgets) -> None:
        self._caller = caller
        self._keys = keys
        self._budgets = budgets
        self._enqueues = Batcher(self._send_enqueues, _size)
        self._settles = Batcher(self._send_settles, lambda item: len(item.frames) + _OVERHEAD_BYTES)
        self._appends = Batcher(self._send_appends, lambda item: len(item.frames) + _OVERHEAD_BYTES)
        self._releases = Batcher(
            self._send_releases, lambda item: len(item.reason) + len(item.envelope) + _OVERHEAD_BYTES
        )

    def enqueue(
        self,
        job: Job,
        listener: str = "",
        options: PersistOptions | None = None,
        patience_ms: int | None = None,
    ) -> asyncio.Future[Enqueued]:
        plain = options is None or options == PersistOptions(options.retention_ms)
        metadata = b"" if options is None or plain else options.metadata.pack()
        return self._enqueues.submit(
            _Enqueue(job, job.pack(), listener or job.reply_to, options or _DEFAULT_OPTIONS, metadata, patience_ms)
        )

    async def append(self, lease: Lease, frames: bytes) -> Settled:
        return await self._appends.submit(_Output(lease, None, frames))

    async def settle(
        self, lease: Lease, outcome: Outcome, frames: bytes, used: int | None, run_ms: int | None
    ) -> Settled:
        return await self._settles.submit(_Output(lease, outcome, frames, used, run_ms))

    async def release(self, lease: Lease, reason: str, counted: bool, avoid_ms: int | None) -> Settled:
        usual = 1 if avoid_ms is None else max(avoid_ms, 2)
        return await self._releases.submit(_Release(lease, reason, usual if counted else 0))

    async def release_yielded(self, lease: Lease, reason: str, following: Job | None) -> Settled:
        envelope = b"" if following is None else following.pack()
        return await self._releases.submit(_Release(lease, reason, "yielded", envelope))

    async def close(self) -> None:
        """Stop; calls under way are cancelled."""
        await asyncio.gather(
            self._enqueues.close(),
            self._settles.close(),
            self._appends.close(),
            self._releases.close(),
        )

    async def _send_enqueues(self, items: Sequence[_Enqueue]) -> list[Enqueued | Exception]:
        limits = self._budgets
        args: list[Any] = [
            limits.tenant_jobs, limits.tenant_bytes, limits.pool_jobs, limits.pool_bytes, limits.tenant_persisted_bytes,
            random_hex()[:12],
        ]  # fmt: skip
        for item in items:
            job = item.job
            args += (
                job.id, item.envelope, encode_name(job.model), job.lane.value, job.band, encode_name(job.tenant),
                item.listener, int(job.persisted), job.ttl_ms, job.max_attempts,
                encode_name(job.region), job.remote_after_ms, _resumption_of(job),
                max(1, min(job.cost_estimate, MAX_COST)), f"{max(MIN_WEIGHT, min(job.weight, MAX_WEIGHT)):g}",
                "" if item.patience_ms is None else item.patience_ms,
                *(_persist_args(item) if job.persisted else _NOT_PERSISTED),
                job.affinity,
            )  # fmt: skip
        # A call may have been carried out, and then have been lost by the server: a repeated one hands nothing over, or
        # it could give an attempt an id that a lost one has.
        repeat_args = [*args[:_ATTEMPT_BASE], "", *args[_ATTEMPT_BASE + 1 :]]
        answers = await self._run("enqueue", args, wait_when_full=False, repeat_args=repeat_args)
        return [_enqueued(answer.decode(), item) for answer, item in zip(answers, items, strict=True)]

    async def _send_settles(self, items: Sequence[_Output]) -> list[Settled | Exception]:
        return await self._settle(items, retry=True)

    async def _send_appends(self, items: Sequence[_Output]) -> list[Settled | Exception]:
        return await self._settle(items, retry=False)

    async def _settle(self, items: Sequence[_Output], *, retry: bool) -> list[Settled | Exception]:
        args: list[Any] = []
        for item in items:
            figures = ("" if figure is None else max(0, min(figure, MAX_FIGURE)) for figure in (item.used, item.run_ms))
            args += (*attempt_of(item.lease), item.outcome.value if item.outcome else "", *figures)
            if item.lease.job.persisted:
                run = split_frames(item.frames)
                args += (int(run.starts_answer), run.first_seq, len(run.frames), *run.frames)
            else:
                args += (0, 0, 1, item.frames) if item.frames else (0, 0, 0)
        return [Settled(answer.decode()) for answer in await self._run("settle", args, retry=retry)]

    async def _send_releases(self, items: Sequence[_Release]) -> list[Settled | Exception]:
        args: list[Any] = []
        for item in items:
            args += (*attempt_of(item.lease), item.ending, item.reason, item.envelope)
        return [Settled(answer.decode()) for answer in await self._run("release", args)]

    async def _run(
        self,
        script: str,
        args: list[Any],
        *,
        wait_when_full: bool = True,
        retry: bool = True,
        repeat_args: list[Any] | None = None,
    ) -> list[bytes]:
        keys = self._keys
        answers: list[bytes] = await self._caller.script(
            script,
            keys.budget,
            keys.prefix,
            *args,
            wait_when_full=wait_when_full,
            retry=retry,
            repeat_args=None if repeat_args is None else (keys.prefix, *repeat_args),
        )
        return answers


def attempt_of(lease: Lease) -> tuple[str, int, str]:
    """The arguments that name an attempt in a script call."""
    return lease.job.id, lease.epoch, lease.attempt_id


def _size(item: _Enqueue) -> int:
    return len(item.envelope) + len(item.metadata) + _OVERHEAD_BYTES


_DEFAULT_OPTIONS = PersistOptions(DEFAULT_RETENTION_MS)
_NOT_PERSISTED = ("",) * 6


def _persist_args(item: _Enqueue) -> tuple[Any, ...]:
    """The arguments of a persisted job beyond those of every job."""
    job, options = item.job, item.options
    request = options.metadata.request_digest or request_digest(job)
    listed = "1" if options.background else ""
    return options.retention_ms, key_digest(job), request, listed, options.topic, item.metadata


def _resumption_of(job: Job) -> str:
    """How ``job`` goes on: ``1`` if, once its attempt is lost, it waits for its Router to say what was delivered;
    ``y<n>`` if it may yield n times; ``0`` otherwise."""
    if job.on_loss == "continue" and job.stream and not job.persisted and job.reply_to:
        return "1"
    return f"y{job.yields}" if job.yields and job.lane is not Lane.INTERACTIVE else "0"


MAX_RETRY_AFTER_S = 3_600
"""Who is refused for a long queue may ask again after an hour: workers may have come."""

_BUDGET_SENTENCES = {
    "tenant_jobs": "your account has too many requests waiting or running",
    "tenant_bytes": "your account has too many bytes of requests waiting or running",
    "pool_jobs": "too many requests wait for model {model}",
    "pool_bytes": "too many bytes of requests wait for model {model}",
}


def _would_wait(predicted_ms: int | None, patience_ms: int) -> WaitTooLong:
    """The error of a request that is refused because it would wait; with a ``patience_ms`` above 0: for too long."""
    about = "" if predicted_ms is None else f", for about {max(1, round(predicted_ms / 1000))} s"
    why = "longer than its deadline allows" if patience_ms else "and it asks not to be queued"
    error = WaitTooLong(
        f"no slot is free: the request would wait{about}, {why}; send it again later, or allow it more time",
        retry_after_s=min(max(1, -(-((predicted_ms or 0) - patience_ms) // 1000)), MAX_RETRY_AFTER_S),
    )
    if predicted_ms is not None:
        error.details["predicted_wait_ms"] = predicted_ms
    return error


def _enqueued(answer: str, item: _Enqueue) -> Enqueued | Exception:
    what, _, rest = answer.partition(" ")
    predicted_ms = int(rest) if what in ("queued", "late") and rest else None
    if what == "late":
        return _would_wait(predicted_ms, item.patience_ms or 0)
    job = item.job
    match what:
        case "over" if rest == "tenant_persisted":
            return OverCapacity(
                "what is kept for your account (background jobs, answers to requests with an Idempotency-Key) fills "
                "its limit; delete what you do not need, or try again when some of it has expired",
                retry_after_s=60,
            )
        case "over":
            sentence = _BUDGET_SENTENCES[rest].format(model=job.model)
            return OverCapacity(f"{sentence}; try again when some have finished", retry_after_s=2)
        case "mismatch":
            return IdempotencyKeyReused(
                "this Idempotency-Key was used for another request: its path, content type or body was not the same; "
                "give each request a key of its own",
                param="idempotency-key",
            )
        case "other":
            job_id, _, state = rest.partition(" ")
            return Enqueued(JobId(job_id), State(state))
    return Enqueued(job.id, State(what), predicted_ms)
