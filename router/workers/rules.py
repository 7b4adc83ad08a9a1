"""What one credential allows a worker, and the file of credentials. Pure."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from queue_schemas import BadMessage, CannotStart, Lane, PermissionRefused
from queue_schemas.fleet.messages import MAX_SLOTS
from queue_schemas.ids import check_region, check_worker_id
from queue_schemas.lanes import LANES

_HASH = re.compile(r"[0-9a-f]{64}")
MAX_WORKERS = 10_000


class WorkerScope(BaseModel):
    """What workers with one credential may do. They are called ``name``, or ``name.`` and something of their own, so
    that the id of a worker says whose it is. Without a ``name``: any."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = ""
    sha256: tuple[str, ...] = Field(default=(), description="of the keys that are accepted; two while one is replaced")
    models: tuple[str, ...] = Field(default=("*",), description="what it may serve; a * at the end stands for any rest")
    lanes: tuple[Lane, ...] = LANES
    region: str | None = None
    others: bool = Field(default=True, description="whether it may run jobs of other regions, and those of none")
    workers: int = Field(default=1, ge=1, le=MAX_WORKERS, description="how many may use it at the same time")
    slots: int = Field(default=256, ge=1, le=MAX_SLOTS, description="jobs that one of them may hold on a shard")

    @field_validator("sha256")
    @classmethod
    def _hashes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for digest in value:
            if not _HASH.fullmatch(digest):
                raise ValueError("expected 64 hex digits in lower case; make them with: printf %s KEY | sha256sum")
        return value

    @field_validator("region")
    @classmethod
    def _region_name(cls, value: str | None) -> str | None:
        try:
            return None if value is None else check_region(value)
        except BadMessage as error:
            raise ValueError(error.message) from error

    @model_validator(mode="after")
    def _names_its_region(self) -> Self:
        if not self.others and not self.region:
            raise ValueError("others = false needs a region, whose jobs are all that it runs")
        return self

    @classmethod
    def unlimited(cls) -> Self:
        """That of a holder of the join token."""
        return cls(workers=MAX_WORKERS, slots=MAX_SLOTS)

    def check_worker(self, worker_id: str) -> None:
        """Raise ``PermissionRefused`` unless it may be a worker's id."""
        if self.name and worker_id != self.name and not worker_id.startswith(f"{self.name}."):
            raise PermissionRefused(
                f"this credential is for workers called {self.name} or {self.name}.SOMETHING, not {worker_id}"
            )

    def check_models(self, models: Iterable[str]) -> None:
        """Raise ``PermissionRefused`` for a model that it may not serve."""
        for model in models:
            if not any(_matches(model, pattern) for pattern in self.models):
                raise PermissionRefused(
                    f"this credential does not allow the model {model!r}; it allows {', '.join(self.models)}",
                    param="models",
                )

    def check_lanes(self, lanes: Iterable[Lane]) -> None:
        """The same for lanes."""
        for lane in lanes:
            if lane not in self.lanes:
                raise PermissionRefused(f"this credential does not allow the lane {lane}", param="lanes")

    def check_region(self, region: str) -> None:
        """The same for a worker's region."""
        if self.region is not None and region != self.region:
            raise PermissionRefused(f"this credential is for workers of region {self.region!r}", param="region")


def _matches(model: str, pattern: str) -> bool:
    return model.startswith(pattern[:-1]) if pattern.endswith("*") else model == pattern


def parse_credentials(text: str, source: str) -> dict[bytes, WorkerScope]:
    """The scopes in a TOML file, by digests of their keys: a table for each credential, under its name. Raises
    ``CannotStart`` that names ``source`` and what is wrong."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CannotStart(f"{source} is not valid TOML: {error}") from None
    found: dict[bytes, WorkerScope] = {}
    for name, table in tables.items():
        scope = _scope_of(name, table, source)
        for digest in scope.sha256:
            key = bytes.fromhex(digest)
            if key in found:
                raise CannotStart(f"{source}: [{name}] has a key that [{found[key].name}] has, too")
            found[key] = scope
    return found


def _scope_of(name: str, table: Any, source: str) -> WorkerScope:
    if not isinstance(table, Mapping):
        raise CannotStart(f"{source}: {name} stands outside a table: begin one with [NAME]")
    try:
        _check_name(name)
        return WorkerScope.model_validate({**table, "name": name})
    except BadMessage as error:
        raise CannotStart(f"{source}: [{name}]: {error.message}") from None
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise CannotStart(f"{source}: [{name}] {where}: {fault['msg']}") from None


def _check_name(name: str) -> None:
    check_worker_id(name)
    if "." in name:
        raise BadMessage("a credential's name has no dot: that is where the rest of a worker's id begins")
