"""The batcher's settings. The queue's are in :class:`broker.BrokerSettings`, the store's in
:class:`storage.StorageSettings`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from telemetry import RoleSettings


class BatchSettings(RoleSettings):
    """Table ``[batches]``, environment ``INFERQ_BATCHES_*``."""

    table: ClassVar[str] = "batches"

    rq_redis_url: str = Field(
        "",
        description="Redis of RQ's own jobs: a plain server (RQ knows no Cluster); empty: the queue's Redis, "
        "where that is one",
    )
