"""Where files and batches lie."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, field_validator

from telemetry import RoleSettings
from telemetry.paths import absolute_path


class StorageSettings(RoleSettings):
    """Table ``[storage]``, environment ``INFERQ_STORAGE_*``: the same for every Router and batcher."""

    table: ClassVar[str] = "storage"
    prefixed: ClassVar[bool] = True

    url: str = Field(
        ".inferq/store",
        min_length=1,
        description="Folder, or URL of a bucket (s3://bucket/prefix, with inferq[s3]), that every Router and batcher "
        "reaches",
    )
    batch_input_bytes: int = Field(200_000_000, ge=1, description="Largest input file of a batch")

    @field_validator("url")
    @classmethod
    def _from_the_root(cls, value: str) -> str:
        """A folder is that of who reads the setting, wherever the process that uses it runs."""
        return value if "://" in value else str(absolute_path(value))
