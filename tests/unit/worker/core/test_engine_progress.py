"""Whether the engine makes progress."""

from __future__ import annotations

from worker.core import EngineProgress


def test_an_idle_worker_is_alive_whatever_its_engine_says() -> None:
    """Without running jobs there is nothing to lose."""
    assert EngineProgress(10).shown_by_output(0, 0, 0.0)


def test_arriving_output_is_proof_enough() -> None:
    """While bytes arrive the engine is not even asked."""
    progress = EngineProgress(10)
    assert progress.shown_by_output(2, 5, 0.0)
    assert progress.shown_by_output(2, 6, 1.0)
    assert not progress.shown_by_output(2, 6, 2.0)


def test_an_engine_that_does_not_answer_is_believed_for_a_while() -> None:
    """A busy server may be late with its pages: no answer is no progress, and no more than that."""
    progress = EngineProgress(10)
    progress.shown_by_output(0, 0, 0.0)
    assert progress.believed(None, 9.9)
    assert not progress.believed(None, 10.0)


def test_an_engine_that_is_back_with_the_same_counter_made_no_progress() -> None:
    """That it answers again is not output."""
    progress = EngineProgress(10)
    assert progress.believed(7, 0.0)
    assert progress.believed(None, 5.0)
    assert not progress.believed(7, 10.0)


def test_a_silent_engine_is_believed_while_its_counter_moves() -> None:
    """A counter that moves is output that has not arrived yet: it may go on for ever."""
    progress = EngineProgress(10)
    assert all(progress.believed(counter, counter * 8.0) for counter in range(1, 20))


def test_an_engine_that_answers_but_produces_nothing_is_believed_for_a_while() -> None:
    """A long prompt takes its time, a hung engine takes for ever: after the limit the leases run out."""
    progress = EngineProgress(10)
    assert progress.believed(7, 0.0)
    assert progress.believed(7, 9.9)
    assert not progress.believed(7, 10.0)
    assert progress.believed(8, 11.0)
