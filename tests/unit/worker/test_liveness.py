"""Whether a worker may keep its leases."""

from __future__ import annotations

from worker.core import Liveness


def test_an_idle_worker_is_alive_whatever_its_engine_says() -> None:
    """Without running jobs there is nothing to lose."""
    assert Liveness(10).moved(0, 0, 0.0)


def test_arriving_output_is_proof_enough() -> None:
    """While bytes arrive the engine is not even asked."""
    life = Liveness(10)
    assert life.moved(2, 5, 0.0)
    assert life.moved(2, 6, 1.0)
    assert not life.moved(2, 6, 2.0)


def test_an_engine_that_does_not_answer_is_not_believed() -> None:
    """No output and no answer: the leases run out."""
    life = Liveness(10)
    life.moved(0, 0, 0.0)
    assert not life.believes(None, 1.0)


def test_a_silent_engine_is_believed_while_its_counter_moves() -> None:
    """A counter that moves is output that has not arrived yet: it may go on for ever."""
    life = Liveness(10)
    assert all(life.believes(counter, counter * 8.0) for counter in range(1, 20))


def test_an_engine_that_answers_but_produces_nothing_is_believed_for_a_while() -> None:
    """A long prompt takes its time, a hung engine takes for ever: after the limit the leases run out."""
    life = Liveness(10)
    assert life.believes(7, 0.0)
    assert life.believes(7, 9.9)
    assert not life.believes(7, 10.0)
    assert life.believes(8, 11.0)
