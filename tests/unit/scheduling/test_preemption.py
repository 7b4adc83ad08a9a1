"""When a worker agrees to have an attempt yield."""

from __future__ import annotations

from queue_schemas import Lane
from scheduling.preemption import YieldPolicy


def test_a_share_of_the_slots_yields_in_a_second() -> None:
    """A flood of interactive requests stops no more than the share, at least one, within any second."""
    for slots, most in ((16, 4), (2, 1)):
        policy, running = YieldPolicy(share=0.25, min_gain_s=0.02), {Lane.BATCH: slots}
        agreed = 0
        for number in range(100):
            now = 100 + number / 101
            if not policy.refusal(now, slots, running, free=0):
                policy.yielded(now)
                agreed += 1
        assert agreed == most
        assert policy.refusal(100.99, slots, running, free=0) == "share"
        assert policy.share_due_s(100.75, slots) == 0.25
        assert policy.refusal(101.0, slots, running, free=0) == ""
        assert policy.share_due_s(101.0, slots) == 0


def test_nothing_yields_while_a_slot_is_free() -> None:
    """The job that waits takes that one."""
    assert YieldPolicy(share=0.5, min_gain_s=0.02).refusal(1.0, 4, {Lane.BATCH: 3}, free=1) == "slot_free"


def test_nothing_yields_when_a_slot_is_about_to_be_free() -> None:
    """With n slots busy one becomes free after an n-th of the mean run time of what runs in them, not of what ran."""
    policy = YieldPolicy(share=0.5, min_gain_s=0.02)
    policy.ran(Lane.BATCH, 0.3)
    assert policy.refusal(1.0, 16, {Lane.BATCH: 16}, free=0) == "slot_due"
    assert policy.refusal(1.0, 8, {Lane.BATCH: 8}, free=0) == ""
    for _ in range(100):
        policy.ran(Lane.BATCH, 10.0)
        policy.ran(Lane.INTERACTIVE, 0.01)
    assert policy.refusal(1.0, 16, {Lane.BATCH: 16}, free=0) == ""
    assert policy.refusal(1.0, 16, {Lane.BATCH: 15, Lane.INTERACTIVE: 1}, free=0) == "slot_due"
    assert policy.refusal(1.0, 16, {Lane.BACKGROUND: 16}, free=0) == ""
    assert 9.9 < policy.mean_run_s[Lane.BATCH] < 10.0
