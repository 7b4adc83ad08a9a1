"""What becomes of an attempt once the engine has answered or failed.

Rules:

* An answer below 500 is the job's answer, errors included: the engine says that the request is at fault, and another
  engine would say the same.
* A 5xx answer, or none, is the engine's fault: the job is tried elsewhere. On the last attempt the engine's own answer
  is better than none, so it is given to the client.
* A stream that broke after it began has no answer that could be given, whichever attempt it was.
"""

from __future__ import annotations

from enum import Enum, auto

from queue_schemas import Outcome


class Retry(Enum):
    """Not an outcome: the job waits again and the attempt is spent."""

    SPENT = auto()


def judge_answer(status: int, attempt: int, max_attempts: int) -> Outcome | Retry:
    """The verdict on a complete answer, or on the head of a stream. ``attempt`` counts from 1."""
    if status < 400:
        return Outcome.DONE
    if status < 500 or attempt >= max_attempts:
        return Outcome.FAILED
    return Retry.SPENT


def judge_failure(begun: bool, attempt: int, max_attempts: int) -> Outcome | Retry:
    """The verdict on a connection that failed; ``begun``: part of an answer was passed on."""
    if begun or attempt < max_attempts:
        return Retry.SPENT
    return Outcome.FAILED
