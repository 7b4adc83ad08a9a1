"""When a worker agrees to have an attempt yield."""

from __future__ import annotations

from scheduling.preemption import YieldPolicy


def test_a_share_of_the_slots_yields_in_a_second() -> None:
    """A flood of interactive requests stops no more than the share, at least one, within any second."""
    policy = YieldPolicy(share=0.25, min_gain_s=0.02)
    for slots, most in ((16, 4), (2, 1)):
        policy = YieldPolicy(share=0.25, min_gain_s=0.02)
        agreed = 0
        for number in range(100):
            now = 100 + number / 101
            if not policy.refusal(now, slots, slots, 0):
                policy.yielded(now)
                agreed += 1
        assert agreed == most
        assert policy.refusal(100.9, slots, slots, 0) == "share"
        assert policy.refusal(101.0, slots, slots, 0) == ""


def test_nothing_yields_while_a_slot_is_free() -> None:
    """The job that waits takes that one."""
    assert YieldPolicy(share=0.5, min_gain_s=0.02).refusal(1.0, 4, 3, 1) == "slot_free"


def test_nothing_yields_when_a_slot_is_about_to_be_free() -> None:
    """With n slots busy one becomes free after an n-th of the mean run time."""
    policy = YieldPolicy(share=0.5, min_gain_s=0.02)
    policy.ran(0.3)
    assert policy.refusal(1.0, 16, 16, 0) == "slot_due"
    assert policy.refusal(1.0, 8, 8, 0) == ""
    for _ in range(100):
        policy.ran(10.0)
    assert policy.refusal(1.0, 16, 16, 0) == ""
    assert policy.mean_run_s is not None
    assert 9.9 < policy.mean_run_s < 10.0
