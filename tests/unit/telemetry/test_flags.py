"""Command line options of the settings."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import pytest
from pydantic import Field

from queue_schemas import CannotStart
from telemetry import CommaList, RoleSettings, TelemetrySettings
from telemetry.flags import parse_settings


class Sample(RoleSettings):
    table: ClassVar[str] = "worker"
    repeatable: ClassVar[Mapping[str, str]] = {"urls": "some-url"}

    port: int = Field(7000, ge=0, le=65_535, description="TCP port")
    insecure: bool = Field(False, description="No guard, 100% open")
    models: CommaList = Field(default_factory=list, description="Models")
    urls: CommaList = Field(default_factory=list, description="Addresses")
    mode: Literal["fast", "slow"] = Field("fast", description="How")


def test_every_field_is_a_flag_of_its_table() -> None:
    """Values, switches, lists and choices, spread over several tables."""
    argv = ["--port", "1", "--insecure", "--models", "a,b", "--mode", "slow", "--log-level", "debug"]
    own, reporting = parse_settings("worker", "A worker.", argv, Sample, TelemetrySettings)
    assert own.model_dump() == {"port": 1, "insecure": True, "models": ["a", "b"], "urls": [], "mode": "slow"}
    assert reporting.model_dump()["log_level"] == "debug"


def test_flags_not_given_leave_the_rest_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a flag the environment holds."""
    monkeypatch.setenv("INFERQ_WORKER_PORT", "5")
    assert parse_settings("worker", "A worker.", [], Sample)[0].model_dump()["port"] == 5


def test_a_wrong_value_is_a_sentence() -> None:
    """A value that does not fit names the flag's field."""
    with pytest.raises(CannotStart, match="port: Input should be"):
        parse_settings("worker", "A worker.", ["--port", "x"], Sample)


def test_help_says_choices_and_variables(capsys: pytest.CaptureFixture[str]) -> None:
    """The help text shows each flag with its variable."""
    with pytest.raises(SystemExit):
        parse_settings("worker", "A worker.", ["--help"], Sample)
    text = " ".join(capsys.readouterr().out.split())
    assert "--mode fast|slow How (INFERQ_WORKER_MODE)" in text
    assert "100% open" in text
    assert "--some-url URL Addresses (INFERQ_WORKER_URLS); may be repeated" in text
    assert "--urls" not in text


def test_a_repeatable_flag_gathers_every_use() -> None:
    """Repeated or with commas, in order."""
    argv = ["--some-url", "a,b", "--some-url", "c"]
    assert parse_settings("worker", "A worker.", argv, Sample)[0].model_dump()["urls"] == ["a", "b", "c"]
