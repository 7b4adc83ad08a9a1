"""What fields of several messages of the worker protocol have in common."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..fleet.messages import MAX_COUNT, MAX_MS, MAX_SHARDS
from ..ids import MAX_REGION_LENGTH

WORKER_PREFIX = "/worker/v1"
MAX_BATCH = 256
"""Most attempts of which one call says something."""
MAX_LEASE_LENGTH = 2_000

Encoding = Literal["text", "base64"]
"""How bytes stand in JSON: ``text`` as they are, which must be UTF-8; ``base64`` by RFC 4648. msgpack has bytes."""

LeaseToken = Annotated[
    str,
    Field(
        max_length=MAX_LEASE_LENGTH,
        description="the lease as the Router gave it: it names the attempt and cannot be changed or made up",
    ),
]
Shard = Annotated[int, Field(ge=0, lt=MAX_SHARDS, description="the part of the queue, as the assignment says")]
Region = Annotated[
    str, Field(max_length=MAX_REGION_LENGTH, description="the worker's: its jobs are run first; empty: none")
]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Milliseconds = Annotated[int, Field(ge=0, le=MAX_MS)]


class Message(BaseModel):
    """Unknown fields are ignored: the other side may be newer."""

    model_config = ConfigDict(frozen=True, extra="ignore")
