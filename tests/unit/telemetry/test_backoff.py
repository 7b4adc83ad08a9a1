"""Pauses between retries grow up to a maximum, and retrying ends where it should."""

from __future__ import annotations

import asyncio

import pytest

from telemetry.backoff import Backoff

NO_TIME = Backoff(0.0001, 0.0001)


def test_pauses_double_up_to_the_maximum() -> None:
    """Without jitter, each pause is twice the one before, and none is longer than the maximum."""
    backoff = Backoff(0.1, 1.0, jitter=0)
    assert [round(backoff.pause_s(failures), 3) for failures in range(1, 7)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert backoff.pause_s(100_000) == 1.0


def test_jitter_shortens_a_pause_by_up_to_its_part() -> None:
    """With the default jitter, pauses are spread over the upper half of their length, at the maximum too."""
    backoff = Backoff(0.1, 1.0)
    for failures, full in ((1, 0.1), (3, 0.4), (50, 1.0)):
        pauses = [backoff.pause_s(failures) for _ in range(200)]
        assert full / 2 <= min(pauses) < max(pauses) <= full
        assert max(pauses) - min(pauses) > full / 4


async def test_a_call_is_retried_until_it_succeeds() -> None:
    """Failures that may pass are reported with the pause that follows, then the result is returned."""
    outcomes: list[Exception | str] = [OSError("one"), OSError("two"), "done"]
    reported: list[str] = []

    async def call() -> str:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def failed(error: BaseException, pause_s: float) -> None:
        assert 0 < pause_s <= 0.0001
        reported.append(str(error))

    result = await NO_TIME.retry(call, when=lambda error: isinstance(error, OSError), failed=failed)
    assert (result, reported) == ("done", ["one", "two"])


async def test_an_error_that_will_not_pass_is_raised_at_once() -> None:
    """What ``when`` refuses is raised as it is, after one call."""
    calls = 0

    async def call() -> None:
        nonlocal calls
        calls += 1
        raise ValueError("never")

    with pytest.raises(ValueError, match="never"):
        await NO_TIME.retry(call, when=lambda error: isinstance(error, OSError))
    assert calls == 1


async def test_the_last_error_is_raised_when_attempts_are_used_up() -> None:
    """``max_attempts`` calls are made, and the last one's own error is raised."""
    calls = 0

    async def call() -> None:
        nonlocal calls
        calls += 1
        raise OSError(f"failure {calls}")

    with pytest.raises(OSError, match="failure 3"):
        await NO_TIME.retry(call, when=lambda _: True, max_attempts=3)
    assert calls == 3


async def test_a_cancelled_retry_ends() -> None:
    """Cancellation during the call, or during the pause, is not an error to retry."""

    async def hang() -> None:
        await asyncio.Event().wait()

    async def fail() -> None:
        raise OSError

    for call in (hang, fail):
        task = asyncio.create_task(Backoff(60, 60).retry(call, when=lambda error: isinstance(error, OSError)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
