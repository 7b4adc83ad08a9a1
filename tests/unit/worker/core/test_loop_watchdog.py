"""Whether a worker may keep its leases."""

from __future__ import annotations

from worker.core import LoopWatchdog


def test_a_late_loop_keeps_its_leases_and_a_stuck_one_does_not() -> None:
    """Renewals go on while it is late, and end when it stood still for its limit or the engine is given up."""
    watchdog = LoopWatchdog(ticked_at=100.0, loop_stall_timeout_s=60.0)
    assert watchdog.may_renew(100.2)
    assert not watchdog.late(100.2)
    assert watchdog.late(101.0)
    assert watchdog.may_renew(159.9)
    assert not watchdog.may_renew(160.0)
    watchdog.ticked_at = 160.0
    assert watchdog.may_renew(160.0)
    watchdog.engine_alive = False
    assert not watchdog.may_renew(160.0)
