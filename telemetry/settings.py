"""Load settings from command-line flags, the environment, ``inferq.toml`` and defaults, in this order.

A role's settings are a subclass of :class:`RoleSettings` that names its table. Field ``port`` of table ``router`` is
``INFERQ_ROUTER_PORT`` in the environment and ``port`` below ``[router]`` in the file, whose path is ``INFERQ_CONFIG``
(``./inferq.toml`` unless given). What several roles share goes by one name everywhere, :data:`SHARED`.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from queue_schemas import BadMessage, CannotStart, check_worker_id
from queue_schemas.fleet.acting_manager import is_manager_url

from .logs import LogFormat, LogLevel
from .redaction import redact_arguments, redact_url
from .variables import is_given, read_variable, warn_of_misspelt

SHARED = frozenset(
    {
        *("data_dir", "redis_url", "join_token", "log_level", "log_format"),
        *("media_domains", "max_choices", "max_entries", "max_logprobs", "max_output_tokens", "tenant_limits"),
    }
)
"""Fields that are also read from ``INFERQ_<FIELD>``, whichever table they stand in."""
TABLES = frozenset(
    {
        "autoscale",
        "batches",
        "broker",
        "manager",
        "notifier",
        "ray",
        "router",
        "storage",
        "telemetry",
        "webhooks",
        "worker",
    }
)
CONFIG_VARIABLE = "INFERQ_CONFIG"
DEFAULT_CONFIG = "inferq.toml"
_MAX_SHOWN = 100
_SECRET_NAME = re.compile("key|token|secret|password")


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


CommaList = Annotated[list[str], NoDecode, BeforeValidator(_split)]
"""A list of text: ``a,b`` in the environment or in one flag, an array in the file."""


def _from_json(value: object) -> object:
    return json.loads(value) if isinstance(value, str) else value


_T = TypeVar("_T")
JsonTable = Annotated[dict[str, _T], NoDecode, BeforeValidator(_from_json)]
"""Entries by name: JSON in the environment or in a flag, a table in the file."""


def _check_http_urls(urls: list[str]) -> list[str]:
    for url in urls:
        if not url.startswith(("http://", "https://")) and not is_manager_url(url):
            raise ValueError(f"--manager-url {url} must begin with http:// or https://")
    return list(dict.fromkeys(url.rstrip("/") for url in urls))


ManagerUrls = Annotated[CommaList, AfterValidator(_check_http_urls)]
"""Base URLs of Managers (or Routers, which lead to them), each once."""


def _check_process_id(value: str) -> str:
    try:
        return check_worker_id(value)
    except BadMessage as error:
        raise ValueError(error.message) from error


ProcessId = Annotated[str, AfterValidator(_check_process_id)]
"""The name of one process of a role, in the form of a worker's id."""


class RoleSettings(BaseSettings):
    """The settings of one role (or of the broker, or of telemetry): frozen, each with unit, default and sentence."""

    table: ClassVar[str]
    repeatable: ClassVar[Mapping[str, str]] = {}
    """Lists that have a flag of another name, given once for each entry: field -> flag. The environment and the file
    may call them by that name, too."""
    prefixed: ClassVar[bool] = False
    """Whether its flags begin with the table's name: ``--storage-url``."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def load(cls, **flags: object) -> Self:
        """The settings with ``flags`` on top; a flag of None was not given. Raises ``CannotStart`` with a sentence."""
        names = [*cls.model_fields, *cls.repeatable.values()]
        known = [f"INFERQ_{cls.table.upper()}_{name.replace('-', '_').upper()}" for name in names]
        warn_of_misspelt(f"INFERQ_{cls.table.upper()}_", known)
        try:
            return cls(**cls._by_field({name: value for name, value in flags.items() if value is not None}))
        except ValidationError as error:
            raise CannotStart(_sentence(cls, error)) from error

    @classmethod
    def _by_field(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """``values`` with each repeatable list that goes by its flag's name under its field's."""
        names = {flag.replace("-", "_"): field for field, flag in cls.repeatable.items()}
        return {name if (field := names.get(name, name)) in values else field: value for name, value in values.items()}

    @classmethod
    def variable(cls, field: str) -> str:
        """The environment variable of ``field``."""
        name = field.replace("-", "_").upper()
        return f"INFERQ_{name}" if field in SHARED else f"INFERQ_{cls.table.upper()}_{name}"

    @classmethod
    def flag(cls, field: str) -> str:
        """The command-line flag of ``field``."""
        name = cls.repeatable.get(field) or (f"{cls.table}-{field}" if cls.prefixed else field)
        return f"--{name.replace('_', '-')}"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        own = EnvSettingsSource(settings_cls, env_prefix=f"INFERQ_{cls.table.upper()}_")
        own.env_vars = {name: value for name, value in own.env_vars.items() if is_given(name.upper(), value)}
        return (init_settings, own, _SharedVariables(settings_cls), _FileTable(settings_cls, cls.table))


class TelemetrySettings(RoleSettings):
    """How a process reports: logs, traces."""

    table: ClassVar[str] = "telemetry"

    log_level: LogLevel = Field("info", description="Least severe log line that is written")
    log_format: LogFormat = Field("auto", description="json, console, or auto: console on a terminal, json elsewhere")
    otlp_endpoint: str = Field("", description="Base URL of an OTLP/HTTP collector that gets traces; empty: no traces")


@dataclass(frozen=True, slots=True)
class SettingFact:
    """One line of ``inferq config``. ``origin`` is ``flag``, an environment variable, the file or ``default``."""

    table: str
    name: str
    value: str
    origin: str
    variable: str
    description: str


def explain_settings(settings: RoleSettings, flags: frozenset[str] = frozenset()) -> list[SettingFact]:
    """Every setting in force and where it came from; secrets and passwords in URLs are hidden."""
    cls = type(settings)
    in_file = _FileTable(cls, cls.table)()
    facts = []
    for name, field in cls.model_fields.items():
        own = f"INFERQ_{cls.table.upper()}_{name.upper()}"
        shared = f"INFERQ_{name.upper()}" if name in SHARED else own
        variables = (own, shared, cls.variable(cls.repeatable.get(name, name)))
        origin = "default"
        if name in flags:
            origin = "flag"
        elif variable := next((one for one in variables if read_variable(one) is not None), ""):
            origin = variable
        elif name in in_file:
            origin = str(_config_path())
        value = _shown(getattr(settings, name))
        facts.append(SettingFact(cls.table, name, value, origin, cls.variable(name), field.description or ""))
    return facts


class _SharedVariables(PydanticBaseSettingsSource):
    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return read_variable(f"INFERQ_{field_name.upper()}"), field_name, False

    def __call__(self) -> dict[str, Any]:
        values = {
            name: read_variable(f"INFERQ_{name.upper()}") for name in SHARED & self.settings_cls.model_fields.keys()
        }
        if issubclass(cls := self.settings_cls, RoleSettings):
            values |= {field: read_variable(cls.variable(flag)) for field, flag in cls.repeatable.items()}
        return {name: value for name, value in values.items() if value is not None}


class _FileTable(PydanticBaseSettingsSource):
    """One table of the file. Keys and tables nobody knows are refused: a misspelt setting must not pass unseen."""

    def __init__(self, settings_cls: type[BaseSettings], table: str) -> None:
        super().__init__(settings_cls)
        self._table = table

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self().get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        path = _config_path()
        if path is None:
            return {}
        content = _read(path)
        _refuse_unknown(path, "table", content.keys(), TABLES)
        table: dict[str, Any] = content.get(self._table, {})
        if not isinstance(table, dict):
            raise CannotStart(f"{path}: write [{self._table}] with its settings below it")
        if issubclass(self.settings_cls, RoleSettings):
            table = self.settings_cls._by_field(table)
        _refuse_unknown(path, f"setting in [{self._table}]", table.keys(), self.settings_cls.model_fields.keys())
        return table


def _config_path() -> Path | None:
    given = read_variable(CONFIG_VARIABLE)
    if given:
        return Path(given)
    default = Path(DEFAULT_CONFIG)
    return default if default.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CannotStart(f"the settings file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CannotStart(f"the settings file {path} is not valid TOML: {error}") from error


def _refuse_unknown(path: Path, what: str, given: Any, known: Any) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise CannotStart(f"{path}: unknown {what} {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def _sentence(cls: type[RoleSettings], error: ValidationError) -> str:
    parts = []
    for fault in error.errors(include_url=False):
        name = ".".join(str(part) for part in fault["loc"])
        field = str(fault["loc"][0]) if fault["loc"] else ""
        where = f" (flag, {cls.variable(field)} or [{cls.table}] {field})" if field in cls.model_fields else ""
        text = fault["msg"].removeprefix("Value error, ") + _given(cls, field, fault["input"])
        parts.append(f"{name}: {text}{where}" if name else text)
    return f"the settings of {cls.table} are wrong: {'; '.join(parts)}"


def _given(cls: type[RoleSettings], field: str, value: object) -> str:
    """The value that was refused, unless it may be a secret."""
    known = cls.model_fields.get(field)
    secret = known is None or "Secret" in str(known.annotation) or _SECRET_NAME.search(field)
    if secret or not isinstance(value, str | int | float):
        return ""
    text = redact_url(str(value))
    return f", not {text[:_MAX_SHOWN]!r}" if text.strip() else " (it is empty)"


def _shown(value: object) -> str:
    if isinstance(value, SecretStr):
        return "***" if value.get_secret_value() else ""
    if isinstance(value, (list, tuple)):
        return ",".join(redact_arguments(map(str, value)))
    return redact_url(str(value))
