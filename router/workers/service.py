"""Runs the queue's calls for workers over HTTP: each call is checked, and is then what a worker beside Redis would do.

A worker is believed in nothing that could hurt jobs other than its own: leases are signed
(:mod:`router.workers.lease_tokens`), frames are made here (:mod:`router.workers.frames`), and what it claims, holds and
says of its costs is bounded by its credential (:mod:`router.workers.rules`) and by what it sent.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

from broker import Undelivered
from openai_api.completions.whole_answer import MAX_PREFIX_BYTES
from queue_schemas import (
    BadMessage,
    BadRequest,
    BrokerUnavailable,
    Heartbeat,
    Job,
    Lease,
    PermissionRefused,
    Pool,
    RegistrationAnswer,
    SessionId,
    Settled,
    ShuttingDown,
)
from queue_schemas.ids import check_session_id
from queue_schemas.worker_protocol.jobs import leased_job
from queue_schemas.worker_protocol.messages import Claim, ClaimCall, Decline, Join, Reconcile
from queue_schemas.worker_protocol.output import Answer, Output, Release, Settle
from scheduling.cost import OUTPUT_WEIGHT
from telemetry import get_logger
from telemetry.http.fabric_calls import Forwarded

from ..lifecycle import RETRY_AFTER_SHUTDOWN_S, Lifecycle
from ..ports import QueuePort
from ..queue_link import QueueLink
from .frames import pack_output
from .lease_tokens import SECRET_BYTES, HeldLease, LeaseTokens
from .membership import Membership, Registry
from .polls import Polls
from .rules import WorkerScope

MAX_OUTPUT_TOKENS = 131_072
"""No answer is believed to have cost more."""
SECRET_INTERVAL_S = 5.0

log = get_logger(__name__)


class WorkerService:
    """The calls of ``/worker/v1``. ``session_id`` is the caller's, which :meth:`admit` has checked.

    Each raises ``BrokerUnavailable`` while the queue is not reached, and ``Fenced`` for a session that was declared
    dead."""

    def __init__(
        self,
        link: QueueLink,
        membership: Membership,
        registry: Registry,
        lifecycle: Lifecycle,
        *,
        max_answer_bytes: int,
    ) -> None:
        self.polls = Polls()
        self._link = link
        self._membership = membership
        self._registry = registry
        self._lifecycle = lifecycle
        self._tokens = LeaseTokens()
        self._signs_for: QueuePort | None = None
        self._max_answer_bytes = max_answer_bytes
        self._claiming: WeakValueDictionary[tuple[int, SessionId], asyncio.Lock] = WeakValueDictionary()
        """Held while a session claims on a shard."""

    def admit(self, scope: WorkerScope, session_id: str) -> SessionId:
        """The session that calls, if it is one of the credential's. Raises ``BadMessage`` and ``PermissionRefused``."""
        session = check_session_id(session_id)
        scope.check_worker(worker_of(session))
        self.polls.called(scope, session)
        return session

    async def join(self, scope: WorkerScope, join: Join, request_id: str) -> dict[str, Any] | Forwarded:
        """A worker joins, or registers again: ``Joined``, or the Manager's refusal."""
        session = self.admit(scope, join.session_id)
        if worker_of(session) != join.worker_id:
            raise BadMessage("session_id is worker_id, a dot and 16 hex digits", param="session_id")
        queue = self._queue()
        answer = await self._membership.register(queue, scope, join, request_id)
        if not isinstance(answer, RegistrationAnswer):
            return answer
        if not join.again and (unjoined := await queue.workers.join(session)):
            # Other Routers, which the session may call next, do not know on which shards it is not yet.
            await queue.workers.forget(session)
            shards = ", ".join(map(str, sorted(unjoined)))
            raise BrokerUnavailable(f"shards of the queue do not answer: {shards}; join again", retry_after_s=2)
        log.info("worker_joined", worker=join.worker_id, session_id=session, again=join.again)
        return answer.model_dump(mode="json") | {"broker_url": ""}

    async def renew(self, session_id: SessionId) -> None:
        """Keep the session's leases."""
        await self._queue().workers.renew(session_id)

    async def heartbeat(
        self, scope: WorkerScope, session_id: SessionId, heartbeat: Heartbeat, request_id: str
    ) -> Forwarded:
        """The same, and tell the Manager how the worker is."""
        if heartbeat.session_id != session_id:
            raise BadMessage("session_id is that of the path", param="session_id")
        report = self._membership.heartbeat(scope, worker_of(session_id), heartbeat, request_id)
        renewed, answer = await asyncio.gather(self.renew(session_id), report, return_exceptions=True)
        for failure in (renewed, answer):
            if isinstance(failure, BaseException):
                raise failure
        return answer  # type: ignore[return-value]  # else it was raised

    async def leave(self, session_id: SessionId, request_id: str) -> None:
        """The session ends; what it holds goes to others as if never started."""
        queue = self._queue()
        await queue.workers.leave(session_id)
        self.polls.forget(session_id)
        await queue.workers.forget(session_id)
        answer = await self._membership.deregister(worker_of(session_id), session_id, request_id)
        log.info("worker_left", session_id=session_id, status=answer.status)

    async def claim(self, scope: WorkerScope, session_id: SessionId, call: ClaimCall) -> dict[str, Any]:
        """``ClaimAnswer``."""
        self._ensure_staying()
        queue = self._on(call.shard)
        await self._ensure_secret(queue)
        answer: dict[str, Any] = {}
        wait_s = call.wait_ms / 1000
        if call.claim is not None:
            answer["claimed"] = await self._claim(queue, scope, session_id, call.shard, call.claim)
            if answer["claimed"]["jobs"]:
                wait_s = 0.0
        if call.wait_ms:
            messages = await self.polls.messages(queue.workers.read_control, call.shard, session_id, call.after, wait_s)
            answer["messages"] = [self._message(session_id, message_id, message) for message_id, message in messages]
        return answer

    async def output(self, session_id: SessionId, outputs: Sequence[Output]) -> list[Answer]:
        """What becomes of pieces of streams."""
        queue = self._queue()
        await self._ensure_secret(queue)
        answers: list[Answer] = ["ok"] * len(outputs)
        replies: dict[int, dict[str, list[bytes]]] = {}
        places: dict[tuple[int, str], list[int]] = {}
        kept: list[tuple[int, Lease, bytes]] = []
        for place, output in enumerate(outputs):
            held = self._tokens.read(output.lease, session_id)
            frames = b"" if held is None else pack_output(held, output, ends=False)
            if held is None or not await self._may_send(queue, held, output):
                answers[place] = "fenced"
            elif frames and held.lease.job.persisted:
                kept.append((place, held.lease, frames))
            elif frames:
                reply_to = held.lease.job.reply_to
                replies.setdefault(held.shard, {}).setdefault(reply_to, []).append(frames)
                places.setdefault((held.shard, reply_to), []).append(place)
        publishing = [
            queue.attempts.publish(shard, {to: b"".join(frames) for to, frames in each.items()})
            for shard, each in replies.items()
        ]
        appending = [queue.attempts.append(lease, frames) for _, lease, frames in kept]
        published, appended = await asyncio.gather(asyncio.gather(*publishing), asyncio.gather(*appending))
        for shard, undelivered in zip(replies, published, strict=True):
            for reply_to, why in undelivered.items():
                for place in places[shard, reply_to]:
                    answers[place] = "full" if why is Undelivered.FULL else "gone"
        for (place, _, _), settled in zip(kept, appended, strict=True):
            answers[place] = settled.value
        return answers

    async def settle(self, session_id: SessionId, ends: Sequence[Settle]) -> list[Answer]:
        """What becomes of attempts that have their answers."""
        queue = self._queue()
        await self._ensure_secret(queue)

        async def settle(end: Settle) -> Answer:
            held = self._tokens.read(end.lease, session_id)
            if held is None:
                return "fenced"
            frames = pack_output(held, end, ends=True)
            if not await self._may_send(queue, held, end):
                return "fenced"
            output_tokens = min(held.sent_bytes, MAX_OUTPUT_TOKENS) if held.seen_whole else MAX_OUTPUT_TOKENS
            used = None if end.used is None else min(end.used, held.body_bytes + OUTPUT_WEIGHT * output_tokens)
            run_ms = None if end.run_ms is None else min(end.run_ms, held.lease.job.ttl_ms)
            answer = await queue.attempts.settle(held.lease, end.outcome, frames, used=used, run_ms=run_ms)
            self._tokens.forget(end.lease)
            return answer.value

        return list(await asyncio.gather(*map(settle, ends)))

    async def release(self, session_id: SessionId, ends: Sequence[Release]) -> list[Answer]:
        """What becomes of attempts that have none."""
        queue = self._queue()
        await self._ensure_secret(queue)
        found = [(end, self._tokens.read(end.lease, session_id)) for end in ends]
        crashed = [(end, held.lease) for end, held in found if held is not None and end.kind == "crashed"]
        charged: dict[str, Answer] = {}
        if crashed:
            settled = await queue.attempts.report_crash([lease for _, lease in crashed], crashed[0][0].reason)
            charged = {end.lease: answer.value for (end, _), answer in zip(crashed, settled, strict=True)}

        async def release(end: Release, held: HeldLease | None) -> Answer:
            if held is None:
                return "fenced"
            if end.kind == "crashed":
                return charged[end.lease]
            return (await _release(queue, held.lease, end)).value

        answers = await asyncio.gather(*(release(end, held) for end, held in found))
        for end in ends:
            self._tokens.forget(end.lease)
        return list(answers)

    async def reconcile(self, session_id: SessionId, call: Reconcile) -> list[str]:
        """Of the leases that the session believes to hold, those that it does not."""
        queue = self._on(call.shard)
        await self._ensure_secret(queue)
        held = {token: found.lease for token in call.leases if (found := self._tokens.read(token, session_id))}
        not_held = await queue.workers.reconcile_leases(
            call.shard, session_id, call.seq, list(held.values()), call.after
        )
        return [token for token in call.leases if token not in held or held[token].attempt_id in not_held]

    async def decline(self, scope: WorkerScope, session_id: SessionId, call: Decline) -> None:
        """An attempt that was asked to yield runs on."""
        scope.check_region(call.region)
        held = await self._current(session_id, call.lease)
        await self._queue().attempts.decline_to_yield(held.lease, for_now=call.for_now, region=call.region)

    async def clear_suspicion(self, session_id: SessionId, token: str) -> None:
        """A suspect has put out more than before its engine crashed."""
        held = await self._held(session_id, token)
        await self._queue().attempts.clear_suspicion(held.lease)

    async def delivered(self, session_id: SessionId, token: str) -> AsyncIterator[bytes]:
        """What is kept of a persisted job's output, in pieces."""
        held = await self._current(session_id, token)
        queue = self._queue()

        async def pieces() -> AsyncIterator[bytes]:
            async for frame in queue.output.frames(held.lease.job.id):
                yield frame.data

        return pieces()

    async def served_elsewhere(self, session_id: SessionId, model: str) -> bool:
        """Whether another worker takes jobs of ``model``; where that is not known: yes."""
        workers = await self._registry.workers(self._queue())
        if not any(info.session_id == session_id for info in workers):
            return True
        return any(info.takes_work and model in info.models for info in workers if info.session_id != session_id)

    async def sweep(self) -> None:
        """Forget sessions that call no more, and let none wait at a Router that shuts down."""
        if self._lifecycle.shutting_down:
            self.polls.end_all()
        for session_id in self.polls.sweep():
            if (queue := self._link.queue) is not None:
                await queue.workers.forget(session_id)

    async def keep_agreeing(self) -> None:
        """Agree on the secret again every few seconds: a server that lost its latest writes may have lost it."""
        while True:
            await asyncio.sleep(SECRET_INTERVAL_S)
            queue = self._link.queue
            if queue is None or self._signs_for is not queue:
                continue  # it is agreed on when it is needed
            try:
                await self._agree(queue)
            except BrokerUnavailable as error:
                log.warning("lease_secret_not_read", error=error.message)

    def close(self) -> None:
        """End all calls that are held, and what is read for them."""
        self.polls.close()

    async def _claim(
        self, queue: QueuePort, scope: WorkerScope, session_id: SessionId, shard: int, claim: Claim
    ) -> dict[str, Any]:
        scope.check_models(pool.pool for pool in claim.pools)
        scope.check_lanes(lane for pool in claim.pools for lane in pool.lanes)
        scope.check_region(claim.region)
        n, offer = claim.n, claim.offer
        # One at a time, so that several do not find the same room.
        async with self._claiming.setdefault((shard, session_id), asyncio.Lock()):
            if scope.name and (n or offer):
                room = max(scope.slots - await queue.signed_leases.held(shard, session_id), 0)
                n, offer = min(n, room), min(offer, room)
            claimed = await queue.workers.claim(
                shard,
                session_id,
                claim.seq,
                claim.turn,
                n,
                [(Pool(pool.pool), pool.lanes) for pool in claim.pools],
                claim.region,
                others=scope.others,
                offer=offer,
                received=claim.received,
                cache=claim.cache,
                slots=min(claim.slots, scope.slots),
                capacity=min(claim.capacity, scope.slots),
            )
        return {
            "jobs": [leased_job(lease, self._tokens.issue(session_id, lease)) for lease in claimed.leases],
            "parked": claimed.parked,
            "handed_over": claimed.handed_over,
            "offered": claimed.offered,
        }

    def _message(self, session_id: SessionId, message_id: str, message: Any) -> dict[str, Any]:
        if message is None:
            return {"id": message_id, "kind": "unknown"}
        fields: dict[str, Any] = {"id": message_id, "kind": message.kind.value}
        if message.lease is not None:
            fields["job"] = leased_job(message.lease, self._tokens.issue(session_id, message.lease))
        optional = {"job_id": message.job_id, "attempt_id": message.attempt_id, "reason": message.reason}
        return fields | {name: value for name, value in optional.items() if value}

    async def _may_send(self, queue: QueuePort, held: HeldLease, output: Output) -> bool:
        """Count what an attempt sends. One that sends more than an answer may have loses its job."""
        held.count(output.seq, output.data)
        if held.sent_bytes <= self._max_answer_bytes:
            return True
        reason = f"its worker sent more than {self._max_answer_bytes} bytes"
        log.warning("answer_too_large", job_id=held.lease.job.id, session_id=held.session_id)
        await queue.attempts.release(held.lease, reason, counted=True)
        return False

    async def _held(self, session_id: SessionId, token: str) -> HeldLease:
        await self._ensure_secret(self._queue())
        held = self._tokens.read(token, session_id)
        if held is None:
            raise PermissionRefused("this is no lease of this session", param="lease")
        return held

    async def _current(self, session_id: SessionId, token: str) -> HeldLease:
        """A lease that still stands."""
        held = await self._held(session_id, token)
        if await self._queue().attempts.append(held.lease, b"") is not Settled.OK:
            raise PermissionRefused("the session does not hold this lease any more", param="lease")
        return held

    async def _ensure_secret(self, queue: QueuePort) -> None:
        """Agree with the other Routers on what leases are signed with, once for each connection to the queue."""
        if self._signs_for is not queue:
            await self._agree(queue)

    async def _agree(self, queue: QueuePort) -> None:
        proposed = self._tokens.secrets[0] if self._tokens.secrets else secrets.token_bytes(SECRET_BYTES)
        self._tokens.use(await queue.signed_leases.secret(proposed))
        self._signs_for = queue

    def _ensure_staying(self) -> None:
        """Raise ``ShuttingDown`` where workers should go to another Router. What they run they may end here still."""
        if self._lifecycle.shutting_down:
            raise ShuttingDown("this router is shutting down: call another one", retry_after_s=RETRY_AFTER_SHUTDOWN_S)

    def _queue(self) -> QueuePort:
        queue = self._link.queue
        if queue is None:
            why = f"the queue cannot be reached: {self._link.reasons[0]}; try again shortly"
            raise BrokerUnavailable(why, retry_after_s=2, public=why)
        return queue

    def _on(self, shard: int) -> QueuePort:
        queue = self._queue()
        if shard >= queue.shards:
            raise BadMessage(f"the queue has {queue.shards} shards: there is no shard {shard}", param="shard")
        return queue


async def _release(queue: QueuePort, lease: Lease, end: Release) -> Settled:
    if end.kind != "yielded":
        return await queue.attempts.release(lease, end.reason, counted=end.kind == "spent", avoid_ms=end.avoid_ms)
    following: Job | None = None
    if end.said is not None:
        if len(end.said.encode("utf-8", "surrogatepass")) > MAX_PREFIX_BYTES:
            raise BadRequest(f"what a job said when it yields has at most {MAX_PREFIX_BYTES} bytes", param="said")
        job = await queue.signed_leases.job_of(lease)
        if job is not None and not job.stream and job.yields:
            following = replace(job, prefix=end.said, yields=job.yields - 1)
    return await queue.attempts.release_yielded(lease, end.reason, following)


def worker_of(session_id: SessionId) -> str:
    """The worker whose session it is."""
    return session_id.rpartition(".")[0]
