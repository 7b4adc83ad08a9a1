"""Where files and batches lie."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from telemetry import RoleSettings


class StorageSettings(RoleSettings):
    """Table ``[storage]``, environment ``INFERQ_STORAGE_*``: the same for every Router and batcher."""

    table: ClassVar[str] = "storage"

    url: str = Field(
        ".inferq/store",
        min_length=1,
        description="Folder, or URL of a bucket (s3://bucket/prefix, with inferq[s3]), that every Router and batcher "
        "reaches",
    )
