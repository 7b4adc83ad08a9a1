"""Settings of the file store, for every role that uses it."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, field_validator

from telemetry import RoleSettings
from telemetry.files import absolute_path


class StorageSettings(RoleSettings):
    """Table ``[storage]``, environment ``INFERQ_STORAGE_*``. Give Routers, batchers and notifiers the same."""

    table: ClassVar[str] = "storage"
    prefixed: ClassVar[bool] = True

    url: str = Field(
        ".inferq/store",
        min_length=1,
        description="Folder, or URL of a bucket (s3://bucket/prefix, with inferq[s3]), shared by all Routers, batchers "
        "and notifiers",
    )
    max_batch_input_bytes: int = Field(200_000_000, ge=1, description="Maximum size of a batch's input file")

    @field_validator("url")
    @classmethod
    def _from_the_root(cls, value: str) -> str:
        """A relative folder is resolved where the setting is read, not where it is used."""
        return value if "://" in value else str(absolute_path(value))
