"""Preemption at one worker session: stop an attempt that the queue asks to yield, if that helps and may be.

The decision is :class:`scheduling.preemption.YieldPolicy`'s; the shard consumers pass the queue's messages on.
"""

from __future__ import annotations

import asyncio

from openai_api.completions.whole_answer import MAX_PREFIX_BYTES
from scheduling.preemption import YieldPolicy
from telemetry import get_logger

from .attempts import Attempt, Attempts, StopReason
from .core import Slots
from .metrics import WorkerMetrics

RECHECK_S = 0.01
"""A claim under way may bring the very job that waits: so long it is waited for."""

log = get_logger(__name__)


class Preemption:
    """Has ``attempts``, which run in ``slots``, yield as far as ``policy`` allows."""

    def __init__(self, policy: YieldPolicy, slots: Slots, attempts: Attempts, metrics: WorkerMetrics) -> None:
        self._policy = policy
        self._slots = slots
        self._attempts = attempts
        self._metrics = metrics

    def ask(self, attempt_id: str) -> None:
        """The queue asks that attempt to yield. Asked again, or too late, it changes nothing."""
        attempt = self._attempts.running(attempt_id)
        if attempt is not None and self._slots.busy < self._slots.total:
            began = self._attempts.interactive_count
            asyncio.get_running_loop().call_later(RECHECK_S, self._ask_again, attempt, began)
        else:
            self._decide(attempt)

    def ended(self, attempt: Attempt) -> None:
        """An attempt is over: what it took tells when others will be."""
        if attempt.stop_reason is None:
            self._policy.ran(attempt.lease.job.lane, asyncio.get_running_loop().time() - attempt.started)

    def _ask_again(self, attempt: Attempt, interactive_before: int) -> None:
        """A slot was free, or asked for, a moment ago. If an interactive job has it now, no other one is needed."""
        if self._attempts.interactive_count > interactive_before:
            self._refuse(attempt, "slot_free")
        else:
            self._decide(attempt)

    def _decide(self, attempt: Attempt | None) -> None:
        now = asyncio.get_running_loop().time()
        reason = _why_not(attempt) or self._policy.refusal(now, self._slots.total, self._attempts.by_lane())
        if attempt is None or reason:
            self._refuse(attempt, reason)
            return
        self._policy.yielded(now)
        attempt.stop(StopReason.YIELDS)

    def _refuse(self, attempt: Attempt | None, reason: str) -> None:
        self._metrics.yields_refused(attempt.lease.job.model if attempt is not None else "", reason).inc()


def _why_not(attempt: Attempt | None) -> str:
    """Why an attempt cannot yield now, as a metric's label; empty if it can."""
    if attempt is None or attempt.ending or attempt.stop_reason is not None:
        return "ended"
    if not attempt.may_yield:
        return "not_continuable"
    if attempt.whole is None:
        return ""
    text = attempt.whole.text
    if text is None:
        return "ending"
    return "too_long" if len(text.encode("utf-8", "surrogatepass")) > MAX_PREFIX_BYTES else ""
