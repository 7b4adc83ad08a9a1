"""Preemption at one worker session: stop an attempt that the queue asks to yield, if that helps and may be.

The decision is :class:`scheduling.preemption.YieldPolicy`'s; the shard consumers pass the queue's messages on.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from openai_api.completions.whole_answer import MAX_PREFIX_BYTES
from queue_schemas import InferqError, Lane, Lease, Pool
from scheduling.preemption import ASK_AGAIN_MS, YieldPolicy
from telemetry import get_logger

from .attempts import Attempt, Attempts
from .core import Claim, Slots
from .metrics import WorkerMetrics
from .queue import Queue

CLAIM_LIMIT_S = 0.1
"""A claim under way may bring the very job that waits: so long its answer is waited for."""
SHARE_LIMIT_S = ASK_AGAIN_MS / 1000
"""So long a request to yield waits for its turn, where as many yielded of late as may: then the queue asks again."""

_FOR_NOW = ("slot_free", "slot_due", "share")
"""Reasons that are not the attempt's own, and pass."""
_OWN = ("not_continuable", "too_long")
"""Reasons of one attempt, which keeps its slot for long."""

log = get_logger(__name__)


class Preemption:
    """Has ``attempts``, which run in ``slots`` of a worker in ``region``, yield as far as ``policy`` allows."""

    def __init__(
        self,
        queue: Queue,
        policy: YieldPolicy,
        slots: Slots,
        attempts: Attempts,
        metrics: WorkerMetrics,
        region: str,
    ) -> None:
        self._queue = queue
        self._policy = policy
        self._slots = slots
        self._attempts = attempts
        self._metrics = metrics
        self._region = region
        self._waiting: list[tuple[Pool | None, asyncio.Future[bool]]] = []
        """Requests to yield that wait for an answer to a claim, by the model of their interactive jobs."""

    @property
    def _free(self) -> int:
        """Free slots that are not spoken for."""
        return self._slots.spare - len(self._waiting)

    async def ask(self, attempt_id: str, shard: int) -> None:
        """The queue asks that attempt at a job of ``shard`` to yield. Asked again, or too late, it changes nothing."""
        loop, slots, policy, reason = asyncio.get_running_loop(), self._slots, self._policy, ""
        began, asked = loop.time(), self._attempts.running(attempt_id)
        waited = self._free > 0 or (asked is None and slots.is_claiming(shard))
        if waited and await self._is_served(asked, CLAIM_LIMIT_S):
            reason = "slot_free"
        asked = asked or self._attempts.running(attempt_id)  # the claim has just brought it
        if asked is None:
            self._metrics.yield_refused("", "ended")
            return
        while not reason:
            now = loop.time()
            attempt, reason = self._to_stop(asked, may_be_over=waited)
            reason = reason or policy.refusal(now, slots.total, self._attempts.by_lane(), free=self._free)
            if not reason:
                policy.yielded(now)
                self._attempts.yield_slot(attempt)
                if attempt is asked:
                    return
                reason = _why_not(asked)
            elif reason == "share" and now < began + SHARE_LIMIT_S:
                waited, wait_s = True, min(policy.share_due_s(now, slots.total), began + SHARE_LIMIT_S - now)
                reason = "slot_free" if await self._is_served(asked, wait_s) else ""
        await self._decline(asked, reason)

    def claimed(self, claim: Claim, leases: Sequence[Lease]) -> None:
        """A claim was answered. The interactive jobs that it brought, but for those that have a slot which an attempt
        gave up, are those for which requests to yield wait; the others look again."""
        interactive = [lease.job.model for lease in leases if lease.job.lane is Lane.INTERACTIVE]
        models: Counter[Pool | None] = Counter(interactive[claim.given_up :])
        for model, served in self._waiting:
            if not served.done():
                served.set_result(models[model] > 0)
                models[model] -= 1

    async def _is_served(self, asked: Attempt | None, limit_s: float) -> bool:
        """Wait for the answer to a claim: whether it brings the interactive job for which ``asked`` should yield. None:
        no attempt that runs yet, so that the claim came before that job."""
        served = asyncio.get_running_loop().create_future()
        waiting = (None if asked is None else asked.lease.job.model, served)
        self._waiting.append(waiting)
        try:
            async with asyncio.timeout(limit_s):
                return bool(await served)
        except TimeoutError:
            return False
        finally:
            self._waiting.remove(waiting)

    def _to_stop(self, asked: Attempt, *, may_be_over: bool) -> tuple[Attempt, str]:
        """The attempt that yields: the one that was asked or, if that cannot, the last of those to begin that can; and
        why none can, as a metric's label. ``may_be_over``: another one is looked for also where the end of the one that
        was asked, which frees a slot as well, may have been a while ago."""
        reason = _why_not(asked)
        if reason in _OWN or (reason and may_be_over):
            for other in reversed(self._attempts.may_yield(asked.lease.job.model)):
                if not _why_not(other):
                    return other, ""
        return asked, reason

    def ended(self, attempt: Attempt) -> None:
        """An attempt is over: what it took tells when others will be."""
        if attempt.stop_reason is None:
            self._policy.ran(attempt.lease.job.lane, asyncio.get_running_loop().time() - attempt.started)

    async def _decline(self, attempt: Attempt, reason: str) -> None:
        self._metrics.yield_refused(attempt.lease.job.model, reason)
        if reason == "ended":
            return  # the queue is being told
        try:
            await self._queue.attempts.decline_to_yield(attempt.lease, for_now=reason in _FOR_NOW, region=self._region)
        except InferqError as error:  # the queue asks others after a while
            log.warning("not_declined", error=error.message, job_id=attempt.lease.job.id)


def _why_not(attempt: Attempt) -> str:
    """Why an attempt cannot yield now, as a metric's label; empty if it can."""
    if attempt.ending or attempt.stop_reason is not None:
        return "ended"
    if attempt.may_yield is False:
        return "not_continuable"
    if attempt.whole is None:
        return ""  # nothing was said that could be lost, or it is in the job's output
    text = attempt.whole.text
    if text is None:
        return "ending"
    return "too_long" if len(text.encode("utf-8", "surrogatepass")) > MAX_PREFIX_BYTES else ""
