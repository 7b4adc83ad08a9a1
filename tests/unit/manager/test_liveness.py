import pytest

from manager.core import DoorState, Evidence, Verdict, judge


def _evidence(
    door: DoorState = DoorState.UNKNOWN,
    *,
    verified: bool = False,
    ping_answered: bool = False,
    has_number: bool = True,
    had_number: bool = True,
    fresh: bool = False,
) -> Evidence:
    return Evidence(door, verified, ping_answered, has_number, had_number, fresh)


@pytest.mark.parametrize(
    ("evidence", "verdict"),
    [
        (_evidence(DoorState.REFUSED, verified=True), Verdict.DEAD),
        (_evidence(DoorState.OTHER, verified=True), Verdict.DEAD),
        (_evidence(DoorState.REFUSED, verified=True, ping_answered=True), Verdict.ALIVE),
        (_evidence(DoorState.REFUSED), Verdict.SILENT),
        (_evidence(DoorState.OTHER), Verdict.SILENT),
        (_evidence(DoorState.UNKNOWN, verified=True), Verdict.SILENT),
        (_evidence(DoorState.SAME), Verdict.ALIVE),
        (_evidence(DoorState.UNKNOWN, fresh=True), Verdict.SILENT),
        (_evidence(has_number=False), Verdict.DEAD),
        (_evidence(DoorState.SAME, has_number=False), Verdict.ALIVE),
        (_evidence(has_number=False, had_number=False, fresh=True), Verdict.ALIVE),
        (_evidence(DoorState.REFUSED, verified=True, has_number=False, had_number=False, fresh=True), Verdict.DEAD),
        (_evidence(has_number=False, had_number=False), Verdict.SILENT),
    ],
)
def test_the_verdict_needs_certainty(evidence: Evidence, verdict: Verdict) -> None:
    """Dead at once only with a verified URL that refuses or is another's and no answer to a ping, or when fenced."""
    assert judge(evidence) is verdict
