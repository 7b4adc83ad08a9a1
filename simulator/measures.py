"""What a simulation measures, and its summary."""

from __future__ import annotations

import statistics
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from queue_schemas.lanes import Lane
from scheduling.prediction import is_off_by, patience_ms

from .requests import Request

ADMISSION_MARGIN = 0.25


@dataclass(frozen=True, slots=True)
class Objectives:
    """A request is good if its first token came within ``ttft_s`` and the others on average every ``tpot_s``. Where
    requests had to start within ``deadline_s``, admission would refuse those whose predicted wait is longer."""

    ttft_s: float = 2.0
    tpot_s: float = 0.05
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """One simulation's figures. Times are in seconds, ``hit_rate`` and ``attainment`` are shares from 0 to 1.

    Objectives and times are those of interactive requests: nobody waits for the tokens of others. ``failed`` requests
    ended without an answer and are not good; times are those of the rest.

    ``fairness`` is the median, over lanes and windows in which several tenants had work waiting throughout, of the
    least weighted service of such a tenant over the most: 1 is fair; None without such a window. ``prediction_error``
    is the median of how far the predicted waits of interactive requests were off, as a part of the real ones; None
    without any. ``refusals`` are interactive requests that admission would refuse for their deadline, and
    ``right_refusals`` those of them that did wait beyond it: all are run. ``redone_tokens`` were computed more than
    once.
    """

    requests: int
    interactive: int
    failed: int
    attainment: float
    goodput: float
    """Good interactive requests for each GPU hour."""
    gpu_hours: float
    peak_workers: int
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    tpot_mean_s: float
    tpot_p99_s: float
    output_tokens_per_s: float
    requests_per_s: float
    hit_rate: float
    redone_tokens: int
    fairness: float | None
    prediction_error: float | None
    refusals: int
    right_refusals: int
    lasted_s: float


class Recorder:
    """Collects what becomes of requests."""

    def __init__(self, objectives: Objectives) -> None:
        self._objectives = objectives
        self._ttft = array("d")
        self._tpot = array("d")
        self._off_by = array("d")
        self._refusals = self._right_refusals = 0
        self._finished = self._interactive = self._good = self._failed = 0
        self._prompt_tokens = self._cached_tokens = self._output_tokens = self._redone_tokens = 0

    def finished(self, request: Request, now: float) -> None:
        """``request`` has its last token."""
        self._finished += 1
        if request.lane is Lane.INTERACTIVE:
            self._time(request, now)
        self._prompt_tokens += request.prompt_tokens
        self._cached_tokens += request.cached
        self._output_tokens += request.output_tokens
        self._redone_tokens += request.redone

    def failed(self, request: Request) -> None:
        """``request`` ended without an answer."""
        self._failed += 1
        self._interactive += request.lane is Lane.INTERACTIVE

    def summary(self, *, gpu_hours: float, peak_workers: int, fairness: float | None, lasted_s: float) -> Summary:
        """The figures of all."""
        ttft, tpot = sorted(self._ttft), sorted(self._tpot)
        return Summary(
            requests=self._finished + self._failed,
            interactive=self._interactive,
            failed=self._failed,
            attainment=self._good / max(self._interactive, 1),
            goodput=self._good / gpu_hours if gpu_hours else 0.0,
            gpu_hours=gpu_hours,
            peak_workers=peak_workers,
            ttft_mean_s=_mean(ttft),
            ttft_p50_s=percentile(ttft, 0.5),
            ttft_p90_s=percentile(ttft, 0.9),
            ttft_p99_s=percentile(ttft, 0.99),
            tpot_mean_s=_mean(tpot),
            tpot_p99_s=percentile(tpot, 0.99),
            output_tokens_per_s=self._output_tokens / lasted_s if lasted_s else 0.0,
            requests_per_s=self._finished / lasted_s if lasted_s else 0.0,
            hit_rate=self._cached_tokens / max(self._prompt_tokens, 1),
            redone_tokens=self._redone_tokens,
            fairness=fairness,
            prediction_error=statistics.median(self._off_by) if self._off_by else None,
            refusals=self._refusals,
            right_refusals=self._right_refusals,
            lasted_s=lasted_s,
        )

    def _time(self, request: Request, now: float) -> None:
        self._interactive += 1
        if request.predicted_ms is not None:
            self._off_by.append(is_off_by(request.predicted_ms, request.waited_ms))
            self._judge(request.predicted_ms, request.waited_ms)
        ttft = request.first_at - request.arrived_at
        self._ttft.append(ttft)
        tpot = 0.0
        if request.output_tokens > 1:
            tpot = (now - request.first_at) / (request.output_tokens - 1)
            self._tpot.append(tpot)
        self._good += ttft <= self._objectives.ttft_s and tpot <= self._objectives.tpot_s

    def _judge(self, predicted_ms: int, waited_ms: int) -> None:
        deadline_s = self._objectives.deadline_s
        if deadline_s is not None and predicted_ms > patience_ms(int(deadline_s * 1e3), ADMISSION_MARGIN):
            self._refusals += 1
            self._right_refusals += waited_ms > deadline_s * 1e3


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of ``ordered`` do not exceed; 0 if there are none."""
    return ordered[max(-int(-share * len(ordered) // 1) - 1, 0)] if ordered else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
