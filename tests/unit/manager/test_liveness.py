import pytest

from manager.core import Evidence, Liveness, ProbeStatus, assess_liveness


def _evidence(
    probe: ProbeStatus = ProbeStatus.UNKNOWN,
    *,
    verified: bool = False,
    ping_answered: bool = False,
    has_counter: bool = True,
    had_counter: bool = True,
    fresh: bool = False,
) -> Evidence:
    return Evidence(probe, verified, ping_answered, has_counter, had_counter, fresh)


@pytest.mark.parametrize(
    ("evidence", "liveness"),
    [
        (_evidence(ProbeStatus.REFUSED, verified=True), Liveness.DEAD),
        (_evidence(ProbeStatus.OTHER, verified=True), Liveness.DEAD),
        (_evidence(ProbeStatus.REFUSED, verified=True, ping_answered=True), Liveness.ALIVE),
        (_evidence(ProbeStatus.REFUSED), Liveness.UNDECIDED),
        (_evidence(ProbeStatus.OTHER), Liveness.UNDECIDED),
        (_evidence(ProbeStatus.UNKNOWN, verified=True), Liveness.UNDECIDED),
        (_evidence(ProbeStatus.SAME), Liveness.ALIVE),
        (_evidence(ProbeStatus.UNKNOWN, fresh=True), Liveness.UNDECIDED),
        (_evidence(has_counter=False), Liveness.DEAD),
        (_evidence(ProbeStatus.SAME, has_counter=False), Liveness.ALIVE),
        (_evidence(has_counter=False, had_counter=False, fresh=True), Liveness.ALIVE),
        (
            _evidence(ProbeStatus.REFUSED, verified=True, has_counter=False, had_counter=False, fresh=True),
            Liveness.DEAD,
        ),
        (_evidence(has_counter=False, had_counter=False), Liveness.UNDECIDED),
    ],
)
def test_a_death_needs_certainty(evidence: Evidence, liveness: Liveness) -> None:
    """Dead at once only with a verified URL that refuses or is another's and no answer to a ping, or when fenced."""
    assert assess_liveness(evidence) is liveness
