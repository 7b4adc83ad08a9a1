"""What becomes of an attempt."""

from __future__ import annotations

from typing import Any

import pytest

from queue_schemas import Lane, Outcome
from tests.support.queue import make_job
from worker.core import Retry, RetryLater, judge_answer, judge_failure, judge_server_error


@pytest.mark.parametrize("status", [200, 204, 301])
def test_success_is_the_answer(status: int) -> None:
    """What is below 400 settles the job as done, on any attempt."""
    assert judge_answer(status, 1, 3) is Outcome.DONE


@pytest.mark.parametrize("status", [400, 404, 422, 429, 499])
def test_a_fault_of_the_request_is_the_answer(status: int) -> None:
    """A 4xx is passed on as it is: another engine would say the same."""
    assert judge_answer(status, 1, 3) is Outcome.FAILED


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_fault_of_the_engine_is_tried_elsewhere_but_not_for_ever(status: int) -> None:
    """A 5xx spends the attempt; on the last one the engine's own answer is given to the client."""
    assert judge_answer(status, 1, 3) is Retry.SPENT
    assert judge_answer(status, 2, 3) is Retry.SPENT
    assert judge_answer(status, 3, 3) is Outcome.FAILED


def test_a_broken_connection_is_tried_elsewhere_and_becomes_an_error_at_last() -> None:
    """Without an answer the attempt is spent; the last one ends in an error object."""
    assert judge_failure(False, 1, 2) is Retry.SPENT
    assert judge_failure(False, 2, 2) is Outcome.FAILED


def test_a_stream_that_broke_after_it_began_is_never_an_answer() -> None:
    """Half a stream is no answer, not even on the last attempt: the queue buries the job."""
    assert judge_failure(True, 2, 2) is Retry.SPENT


@pytest.mark.parametrize(
    ("fields", "retry_after_s", "elsewhere", "verdict"),
    [
        ({}, None, True, Retry.SPENT),
        ({}, None, False, Outcome.FAILED),
        ({}, 5.0, False, RetryLater(5.0)),
        ({}, 5.0, True, RetryLater(5.0)),
        ({}, 0.0, False, RetryLater(0.0)),
        ({}, 30.0, False, Outcome.FAILED),
        ({}, 30.0, True, Retry.SPENT),
        ({"lane": Lane.BATCH}, None, False, Retry.SPENT),
        ({"lane": Lane.BATCH}, 30.0, False, Retry.SPENT),
        ({"persisted": True}, None, False, Retry.SPENT),
    ],
)
def test_an_engines_error_waits_only_where_that_may_help(
    fields: dict[str, Any], retry_after_s: float | None, elsewhere: bool, verdict: Outcome | Retry | RetryLater
) -> None:
    """[C8] Elsewhere, after the time that the engine named if the deadline allows it, or where no client asks again."""
    found = judge_server_error(make_job(**fields), retry_after_s=retry_after_s, remaining_s=20.0, elsewhere=elsewhere)
    assert found == verdict
