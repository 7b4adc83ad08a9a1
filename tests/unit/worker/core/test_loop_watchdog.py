"""Whether a worker may keep its leases."""

from __future__ import annotations

from worker.core import Liveness, LoopWatchdog


def test_an_idle_worker_is_alive_whatever_its_engine_says() -> None:
    """Without running jobs there is nothing to lose."""
    assert Liveness(10).moved(0, 0, 0.0)


def test_arriving_output_is_proof_enough() -> None:
    """While bytes arrive the engine is not even asked."""
    life = Liveness(10)
    assert life.moved(2, 5, 0.0)
    assert life.moved(2, 6, 1.0)
    assert not life.moved(2, 6, 2.0)


def test_an_engine_that_does_not_answer_is_believed_for_a_while() -> None:
    """A busy server may be late with its pages: no answer is no progress, and no more than that."""
    life = Liveness(10)
    life.moved(0, 0, 0.0)
    assert life.believes(None, 9.9)
    assert not life.believes(None, 10.0)


def test_an_engine_that_is_back_with_the_same_counter_made_no_progress() -> None:
    """That it answers again is not output."""
    life = Liveness(10)
    assert life.believes(7, 0.0)
    assert life.believes(None, 5.0)
    assert not life.believes(7, 10.0)


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


def test_the_pulse_of_the_serving_loop() -> None:
    """Renewals go on while it is late, and end when it stood still for its limit or the engine is given up."""
    watchdog = LoopWatchdog(ticked_at=100.0, loop_limit_s=60.0)
    assert watchdog.may_renew(100.2)
    assert not watchdog.late(100.2)
    assert watchdog.late(101.0)
    assert watchdog.may_renew(159.9)
    assert not watchdog.may_renew(160.0)
    watchdog.ticked_at = 160.0
    assert watchdog.may_renew(160.0)
    watchdog.engine_alive = False
    assert not watchdog.may_renew(160.0)
