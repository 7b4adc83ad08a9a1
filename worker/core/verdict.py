"""Decide what becomes of an attempt once the engine has answered or failed.

Rules:

* An answer below 500 is the job's answer, errors included: the engine says that the request is at fault, and another
  engine would say the same.
* A redirect is no answer: it says that the engine is elsewhere, and nobody follows it
  (:mod:`worker.attempts.runner`).
* A 5xx answer, or none, is the engine's fault: the job is tried elsewhere. On the last attempt the engine's own answer
  is better than none, so it is given to the client.
* If no other worker serves the model, a client that waits gets a 5xx at once: the same engine would be asked again, and
  again by the client's own retries. If the engine says when to come back (``Retry-After``), the job waits that long,
  unless its time runs out before.
* Background work, and jobs whose output is persisted, are retried on the same engine: no client retries them.
* A stream that broke after it began has no answer that could be given, whichever attempt it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from queue_schemas import Job, Lane, Outcome


class Retry(Enum):
    """Not an outcome: the job waits again and the attempt is spent."""

    SPENT = auto()


@dataclass(frozen=True, slots=True)
class RetryLater:
    """Not an outcome: the job waits again, the attempt is spent, and this worker is not given it before ``wait_s``."""

    wait_s: float


def judge_answer(status: int, attempt: int, max_attempts: int) -> Outcome | Retry:
    """The verdict on a complete answer, or on the head of a stream. ``attempt`` counts from 1."""
    if status < 400:
        return Outcome.DONE
    if status < 500 or attempt >= max_attempts:
        return Outcome.FAILED
    return Retry.SPENT


def judge_server_error(
    job: Job, *, retry_after_s: float | None, remaining_s: float, elsewhere: bool
) -> Outcome | Retry | RetryLater:
    """The verdict on a 5xx answer before the last attempt. ``retry_after_s``: what the engine said; ``elsewhere``:
    whether another worker serves the model."""
    if retry_after_s is not None and retry_after_s < remaining_s:
        return RetryLater(retry_after_s)
    if elsewhere or job.persisted or job.lane is not Lane.INTERACTIVE:
        return Retry.SPENT
    return Outcome.FAILED


def judge_failure(begun: bool, attempt: int, max_attempts: int) -> Outcome | Retry:
    """The verdict on a connection that failed; ``begun``: part of an answer was passed on."""
    if begun or attempt < max_attempts:
        return Retry.SPENT
    return Outcome.FAILED
