"""The autoscaler's bench: every way to size a fleet serves the whole trace, and is judged beside ours."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest

from bench.autoscale import Case, beside, cases, simulated

OPTIONS = argparse.Namespace(
    trace="poisson:requests=300,rate=20,prompt=500,output=60", copies=1, limit=None, min=1, max=8, slots=8,
    max_slots=16, target_wait_ms=[2_000.0], threshold=[20, 10], workers=[1, 2],
)  # fmt: skip


@pytest.mark.parametrize("case", cases(OPTIONS), ids=lambda case: case.name)
def test_every_fleet_serves_the_trace(case: Case) -> None:
    """With no more workers than it may have."""
    found = simulated(OPTIONS, case)
    assert (found.requests, found.failed) == (300, 0)
    assert 0 < found.gpu_hours < 1
    if case.fleet == "fixed":
        assert found.peak_workers == case.setting
    elif case.fleet != "clairvoyant":
        assert found.peak_workers <= OPTIONS.max


def test_a_fleet_is_worse_if_ours_meets_as_many_objectives_for_as_little() -> None:
    """Better the other way round; else it is another choice."""
    ours = replace(simulated(OPTIONS, Case("fixed", 1)), attainment=0.9, gpu_hours=5.0)
    for attainment, gpu_hours, judged in (
        (0.8, 6.0, "worse"),
        (0.9, 5.0, "worse"),
        (0.95, 4.0, "better"),
        (0.95, 6.0, "more met, for more"),
        (0.8, 4.0, "less met, for less"),
    ):
        assert beside(replace(ours, attainment=attainment, gpu_hours=gpu_hours), [ours]) == judged
