"""What the simulation takes from the workers' settings."""

from __future__ import annotations

from simulator.policies.yielding import MIN_GAIN_S, SHARE
from worker.settings import WorkerSettings


def test_workers_agree_as_their_defaults_say() -> None:
    """Which may change: then the simulation must."""
    fields = WorkerSettings.model_fields
    assert fields["preemption_share"].default == SHARE
    assert fields["preemption_min_gain_ms"].default == MIN_GAIN_S * 1000
