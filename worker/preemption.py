"""Preemption at one worker session: stop an attempt that the queue asks to yield, if that helps and may be.

The decision is :class:`scheduling.preemption.YieldPolicy`'s; the shard consumers pass the queue's messages on.
"""

from __future__ import annotations

import asyncio

from broker import Broker
from openai_api.completions.whole_answer import MAX_PREFIX_BYTES
from queue_schemas import InferqError
from scheduling.preemption import YieldPolicy
from telemetry import get_logger

from .attempts import Attempt, Attempts
from .core import Slots
from .metrics import WorkerMetrics

RECHECK_S = 0.01
"""A claim under way may bring the very job that waits: so long it is waited for."""

_FOR_NOW = ("slot_free", "slot_due", "share", "starting")
"""Reasons that are not the attempt's own, or that pass."""

log = get_logger(__name__)


class Preemption:
    """Has ``attempts``, which run in ``slots``, yield as far as ``policy`` allows."""

    def __init__(
        self, broker: Broker, policy: YieldPolicy, slots: Slots, attempts: Attempts, metrics: WorkerMetrics
    ) -> None:
        self._broker = broker
        self._policy = policy
        self._slots = slots
        self._attempts = attempts
        self._metrics = metrics

    async def ask(self, attempt_id: str) -> None:
        """The queue asks that attempt to yield. Asked again, or too late, it changes nothing."""
        attempt = self._attempts.running(attempt_id)
        if attempt is None:
            self._metrics.yields_refused("", "ended").inc()
            return
        reason = ""
        if self._slots.busy < self._slots.total:
            # A slot is free, or asked for. If an interactive job has it in a moment, no other one is needed.
            began = self._attempts.interactive_count
            await asyncio.sleep(RECHECK_S)
            reason = "slot_free" if self._attempts.interactive_count > began else ""
        now = asyncio.get_running_loop().time()
        reason = reason or _why_not(attempt)
        reason = reason or self._policy.refusal(now, self._slots.total, self._attempts.by_lane())
        if reason:
            await self._decline(attempt, reason)
            return
        self._policy.yielded(now)
        self._attempts.yield_slot(attempt)

    def ended(self, attempt: Attempt) -> None:
        """An attempt is over: what it took tells when others will be."""
        if attempt.stop_reason is None:
            self._policy.ran(attempt.lease.job.lane, asyncio.get_running_loop().time() - attempt.started)

    async def _decline(self, attempt: Attempt, reason: str) -> None:
        self._metrics.yields_refused(attempt.lease.job.model, reason).inc()
        if reason == "ended":
            return  # the queue is being told
        try:
            await self._broker.attempts.decline_to_yield(attempt.lease, for_now=reason in _FOR_NOW)
        except InferqError as error:  # the queue asks others after a while
            log.warning("not_declined", error=error.message, job_id=attempt.lease.job.id)


def _why_not(attempt: Attempt) -> str:
    """Why an attempt cannot yield now, as a metric's label; empty if it can."""
    if attempt.ending or attempt.stop_reason is not None:
        return "ended"
    if not attempt.may_yield:
        return "starting" if attempt.may_yield is None else "not_continuable"
    if attempt.whole is None:
        return ""
    text = attempt.whole.text
    if text is None:
        return "ending"
    return "too_long" if len(text.encode("utf-8", "surrogatepass")) > MAX_PREFIX_BYTES else ""
