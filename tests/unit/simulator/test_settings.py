"""What the simulation takes from settings of the roles."""

from __future__ import annotations

from router.settings import RouterSettings
from simulator.measures import ADMISSION_MARGIN
from simulator.policies.yielding import MIN_GAIN_S, SHARE
from worker.settings import WorkerSettings


def test_roles_decide_as_their_defaults_say() -> None:
    """Which may change: then the simulation must."""
    fields = WorkerSettings.model_fields
    assert fields["preemption_share"].default == SHARE
    assert fields["preemption_min_gain_ms"].default == MIN_GAIN_S * 1000
    assert RouterSettings.model_fields["admission_margin"].default == ADMISSION_MARGIN
