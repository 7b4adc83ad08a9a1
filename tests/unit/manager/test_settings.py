import pytest

from manager import ManagerSettings
from queue_schemas import CannotStart


def test_defaults_are_the_contracts() -> None:
    """Lease 15 s, heartbeat 2 s, unresponsive after 6 s, on loopback :9000."""
    settings = ManagerSettings.load()
    assert (settings.lease_ms, settings.heartbeat_interval_ms, settings.unresponsive_after_ms) == (15_000, 2_000, 6_000)
    assert (settings.host, settings.port) == ("127.0.0.1", 9000)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"unresponsive_after_ms": 3_000}, "at least twice heartbeat_interval_ms"),
        ({"lease_ms": 3_000}, "at most a quarter of lease_ms"),
        ({"port": 70_000}, "INFERQ_MANAGER_PORT"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields: dict[str, int], sentence: str) -> None:
    """Intervals out of proportion and wrong values are told in a sentence."""
    with pytest.raises(CannotStart, match=sentence):
        ManagerSettings.load(**fields)


def test_every_setting_has_a_sentence_and_times_have_units() -> None:
    """Each field is described; numbers of time say their unit in the name."""
    for name, field in ManagerSettings.model_fields.items():
        assert field.description, name
        if field.annotation is int and name != "port":
            assert name.endswith("_ms"), name
