"""Settings from flags, environment and file: precedence, errors, explanations."""

from pathlib import Path
from typing import ClassVar, Self

import pytest
from pydantic import Field, SecretStr, model_validator

from batches.settings import BatchSettings
from manager.settings import ManagerSettings
from queue_schemas import CannotStart
from router.settings import RouterSettings
from telemetry import CommaList, RoleSettings, TelemetrySettings, explain_settings
from telemetry.flags import parse_settings
from webhooks.settings import NotifierSettings
from worker.settings import WorkerSettings


class Sample(RoleSettings):
    table: ClassVar[str] = "manager"

    port: int = Field(9000, ge=0, le=65535, description="TCP port")
    host: str = Field("127.0.0.1", description="Address to listen on")
    redis_url: str = Field("", description="The broker")
    join_token: SecretStr = Field(SecretStr(""), description="What workers show")
    pools: CommaList = Field(default_factory=list, description="Declared models")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("INFERQ_CONFIG", "INFERQ_REDIS_URL", "INFERQ_JOIN_TOKEN", "INFERQ_MANAGER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_flags_win_over_the_environment_and_that_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of precedence is flag, environment, file, default."""
    Path("inferq.toml").write_text('[manager]\nport = 1\nhost = "::1"\n[worker]\nslots = 3\n')
    assert (Sample.load().port, Sample.load().host) == (1, "::1")
    monkeypatch.setenv("INFERQ_MANAGER_PORT", "2")
    assert Sample.load().port == 2
    assert Sample.load(port=3, host=None).port == 3
    assert Sample.load(port=3, host=None).host == "::1"


def test_shared_names_are_read_from_short_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """INFERQ_REDIS_URL reaches every role; a role's own variable wins over it."""
    monkeypatch.setenv("INFERQ_REDIS_URL", "redis://shared")
    monkeypatch.setenv("INFERQ_JOIN_TOKEN", "secret")
    monkeypatch.setenv("INFERQ_PORT", "5")
    assert Sample.load().redis_url == "redis://shared"
    assert Sample.load().join_token.get_secret_value() == "secret"
    assert Sample.load().port == 9000
    monkeypatch.setenv("INFERQ_MANAGER_REDIS_URL", "redis://own")
    assert Sample.load().redis_url == "redis://own"


def test_lists_are_written_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list is comma-separated in the environment and an array in the file."""
    monkeypatch.setenv("INFERQ_MANAGER_POOLS", "a/b, c,")
    assert Sample.load().pools == ["a/b", "c"]
    monkeypatch.delenv("INFERQ_MANAGER_POOLS")
    Path("inferq.toml").write_text('[manager]\npools = ["x", "y"]\n')
    assert Sample.load().pools == ["x", "y"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[manager]\nprot = 1\n", r"unknown setting in \[manager\] prot; known are host, join_token"),
        ("[mananger]\nport = 1\n", "unknown table mananger; known are autoscale, batches, broker, manager"),
        ("[manager\n", "is not valid TOML"),
        ("manager = 1\n", r"write \[manager\] with its settings below it"),
        ("[manager]\nport = 99999\n", r"port: .* \(flag, INFERQ_MANAGER_PORT or \[manager\] port\)"),
    ],
)
def test_a_wrong_file_is_a_sentence(content: str, sentence: str) -> None:
    """A misspelt key or table, bad TOML and a bad value each say what is wrong and where."""
    Path("inferq.toml").write_text(content)
    with pytest.raises(CannotStart, match=sentence):
        Sample.load()


def test_a_named_file_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing INFERQ_CONFIG is an error; a missing ./inferq.toml is not."""
    assert Sample.load().port == 9000
    monkeypatch.setenv("INFERQ_CONFIG", "elsewhere.toml")
    with pytest.raises(CannotStart, match=r"elsewhere\.toml cannot be read"):
        Sample.load()


def test_a_fault_of_our_own_is_only_its_sentence() -> None:
    """What a check of several settings says stands alone: no "Value error", no empty place before it."""

    class Checked(Sample):
        @model_validator(mode="after")
        def _never(self) -> Self:
            raise ValueError("that does not go together")

    with pytest.raises(CannotStart) as refused:
        Checked.load()
    assert refused.value.message == "the settings of manager are wrong: that does not go together"


def test_the_data_folder_has_one_variable_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """INFERQ_DATA_DIR is the folder of `inferq manager` too."""
    monkeypatch.setenv("INFERQ_DATA_DIR", "/srv/inferq")
    assert ManagerSettings.load().data_dir == "/srv/inferq"
    assert ManagerSettings.variable("data_dir") == "INFERQ_DATA_DIR"


def test_an_unknown_flag_is_refused() -> None:
    """A flag that is no setting does not pass silently."""
    with pytest.raises(CannotStart, match="prot"):
        Sample.load(prot=1)


def test_settings_can_be_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every setting says where it came from; secrets and passwords stay hidden."""
    Path("inferq.toml").write_text('[manager]\nhost = "::1"\n')
    monkeypatch.setenv("INFERQ_REDIS_URL", "redis://user:pass@example/0")
    facts = {fact.name: fact for fact in explain_settings(Sample.load(port=1, join_token="x"), frozenset({"port"}))}
    assert [facts[name].origin for name in ("port", "host", "redis_url", "pools")] == [
        "flag",
        "inferq.toml",
        "INFERQ_REDIS_URL",
        "default",
    ]
    assert facts["redis_url"].value == "redis://user:***@example/0"
    assert facts["join_token"].value == "***"
    assert facts["port"].variable == "INFERQ_MANAGER_PORT"


def test_telemetry_has_safe_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs at info, traces off; the level by its short variable."""
    assert TelemetrySettings.load().otlp_endpoint == ""
    monkeypatch.setenv("INFERQ_LOG_LEVEL", "debug")
    assert TelemetrySettings.load().log_level == "debug"


MANAGERS = ["http://a:9000", "http://b:9000"]


@pytest.mark.parametrize("table", [RouterSettings, WorkerSettings, BatchSettings, NotifierSettings])
@pytest.mark.parametrize("name", ["manager_url", "manager_urls"])
def test_several_managers_may_be_named_everywhere(
    table: type[RoleSettings], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[A7] Repeated flags, commas, the environment and the file, by the flag's name or the setting's: every role that
    asks Managers takes several, and keeps all of them, each once."""
    engine = ["--engine", "sim"] if table is WorkerSettings else []

    def read(*flags: str) -> object:
        return getattr(parse_settings("role", "", [*engine, *flags], table)[0], "manager_urls", None)

    assert read("--manager-url", MANAGERS[0], "--manager-url", f"{MANAGERS[1]}/,{MANAGERS[0]}") == MANAGERS
    Path("inferq.toml").write_text(f'[{table.table}]\n{name} = ["{MANAGERS[1]}"]\n')
    assert read() == MANAGERS[1:]
    monkeypatch.setenv(f"INFERQ_{table.table.upper()}_{name.upper()}", ", ".join(MANAGERS))
    assert read() == MANAGERS
    assert read("--manager-url", "http://c") == ["http://c"]
    with pytest.raises(CannotStart, match="must begin with http"):
        read("--manager-url", "http://a,localhost:9000")


@pytest.mark.parametrize("settings", [RouterSettings, ManagerSettings, WorkerSettings, BatchSettings, NotifierSettings])
def test_empty_variables_are_unset(settings: type[RoleSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    """[G5] Whatever ``${VAR:-}`` leaves empty or blank is at its default and says so, for each setting of a role."""
    flags = {"model": "m"} if settings is WorkerSettings else {}
    expected = {fact.name: (fact.value, fact.origin) for fact in explain_settings(settings.load(**flags))}
    for place, name in enumerate(settings.model_fields):
        for variable in (settings.variable(name), f"INFERQ_{settings.table.upper()}_{name.upper()}"):
            monkeypatch.setenv(variable, " " if place % 2 else "")
    found = settings.load(**flags)
    assert {fact.name: (fact.value, fact.origin) for fact in explain_settings(found)} == expected


@pytest.mark.parametrize("settings", [RouterSettings, ManagerSettings, WorkerSettings])
def test_links_of_kubernetes_are_no_settings(
    settings: type[RoleSettings], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """[G5] What Kubernetes sets for a Service named as a role is ignored, and said once."""
    monkeypatch.setattr("telemetry.variables._told", set())
    flags = {"model": "m"} if settings is WorkerSettings else {}
    before = settings.load(**flags)
    prefix = f"INFERQ_{settings.table.upper()}"
    for name, value in {
        "PORT": "tcp://10.0.0.1:18000",
        "SERVICE_HOST": "10.0.0.1",
        "SERVICE_PORT": "18000",
        "SERVICE_PORT_HTTP": "18000",
        "PORT_18000_TCP": "tcp://10.0.0.1:18000",
        "PORT_18000_TCP_ADDR": "10.0.0.1",
    }.items():
        monkeypatch.setenv(f"{prefix}_{name}", value)
    assert settings.load(**flags) == settings.load(**flags) == before
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{prefix}_PORT=tcp://10.0.0.1:18000 is ignored" in said


def test_a_refused_value_is_shown_with_its_variable_unless_it_is_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """[G5] The sentence has the value, the rule and the variable; passwords and keys stay hidden."""
    monkeypatch.setenv("INFERQ_MANAGER_PORT", "tcp://10.0.0.1")
    with pytest.raises(CannotStart, match=r"port: .*valid integer.*'tcp://10\.0\.0\.1' \(flag, INFERQ_MANAGER_PORT or"):
        Sample.load()
    monkeypatch.setenv("INFERQ_MANAGER_PORT", "70000")
    with pytest.raises(CannotStart, match="less than or equal to 65535, not '70000'"):
        Sample.load()
    monkeypatch.delenv("INFERQ_MANAGER_PORT")
    monkeypatch.setenv("inferq_manager_port", "9001")
    assert Sample.load().port == 9001

    class Secretive(Sample):
        join_token: SecretStr = Field(SecretStr(""), max_length=3)
        api_keys: str = Field("", max_length=3)
        redis_url: str = Field("", max_length=3)

    for name in ("join_token", "api_keys", "redis_url"):
        with pytest.raises(CannotStart) as refused:
            Secretive.load(**{name: "redis://user:hunter2@host"})
        assert "hunter2" not in refused.value.message


def test_a_misspelt_variable_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """[G5] A variable that is spelt nearly like a setting is not ignored in silence."""
    monkeypatch.setattr("telemetry.variables._told", set())
    monkeypatch.setenv("INFERQ_MANAGER_PROT", "1")
    assert Sample.load().port == 9000
    assert (
        capsys.readouterr().err
        == "inferq: INFERQ_MANAGER_PROT is not a setting: is it INFERQ_MANAGER_PORT that you mean?\n"
    )


@pytest.mark.parametrize("role", [RouterSettings, ManagerSettings, WorkerSettings, BatchSettings, NotifierSettings])
def test_a_join_token_is_what_a_header_can_carry(role: type[RoleSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    """[H32] The newline of a secret file is no part of the token; one that cannot be sent is refused unshown."""
    flags = {"engine": "sim"} if role is WorkerSettings else {}
    monkeypatch.setenv("INFERQ_JOIN_TOKEN", "t0ken\n")
    token = getattr(role.load(**flags), "join_token")  # noqa: B009 - each role has one, their base has none
    assert token.get_secret_value() == "t0ken"
    for wrong in ("t0ken\nof two lines", "t\u00f6ken"):
        monkeypatch.setenv("INFERQ_JOIN_TOKEN", wrong)
        with pytest.raises(CannotStart, match="join_token: use printable ASCII") as refused:
            role.load(**flags)
        assert wrong not in refused.value.message


def test_an_engines_key_is_what_a_header_can_carry(monkeypatch: pytest.MonkeyPatch) -> None:
    """[H32] The key that a worker sends to its engine follows the same rule."""
    monkeypatch.setenv("INFERQ_WORKER_ENGINE_API_KEY", "sk-1\n")
    settings = WorkerSettings.load(engine="sim")
    assert settings.engine_api_key.get_secret_value() == "sk-1"
