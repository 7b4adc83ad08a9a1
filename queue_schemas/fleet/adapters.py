"""LoRA adapters in messages of the control plane: how many a worker may name, and one name for all that it names.

Many workers may load the same thousand adapters. Their names travel in registrations alone; what is read often (the
registry's entries, by every Router each second) has the name of their set instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from ..errors import BadMessage
from ..ids import MAX_NAME_BYTES, check_name
from .fields import checked, is_empty

MAX_ADAPTERS = 4_096
"""Most adapters that one worker may say it could load."""
MAX_ADAPTER_NAMES_BYTES = 128 * 1024
"""Of all their names together, in UTF-8."""
MAX_ADAPTER_ROOM = 256
"""Most adapters that one worker may hold at a time."""
MAX_FAILURE_LENGTH = 300
ADAPTER_SET_PATTERN = "([0-9a-f]{32})?"


def adapter_set_of(names: Iterable[str]) -> str:
    """The name of a set of adapters: of the same ones the same, in any order; empty for none."""
    listed = "\0".join(sorted(set(names)))
    return hashlib.blake2b(listed.encode(), digest_size=16).hexdigest() if listed else ""


def _check_names(names: list[str]) -> list[str]:
    for name in names:
        check_name(name, "adapter")
    size = sum(len(name.encode()) for name in names)
    if size > MAX_ADAPTER_NAMES_BYTES:
        raise BadMessage(
            f"the names of a worker's adapters may have {MAX_ADAPTER_NAMES_BYTES} bytes in all, not {size}"
        )
    return names


AdapterNames = Annotated[
    list[str],
    checked(_check_names),
    Field(
        max_length=MAX_ADAPTERS,
        exclude_if=is_empty,
        description="LoRA adapters that its engine could load while it serves their base model",
    ),
]
AdapterBase = Annotated[
    str,
    Field(
        max_length=MAX_NAME_BYTES,
        exclude_if=is_empty,
        description="of the models that its engine could load, the one that these adapters fit; empty: it has but one",
    ),
]
AdapterRoom = Annotated[
    int,
    Field(ge=0, le=MAX_ADAPTER_ROOM, exclude_if=is_empty, description="adapters that it may hold at a time"),
]
AdapterFailures = Annotated[
    dict[str, Annotated[str, Field(max_length=MAX_FAILURE_LENGTH)]],
    Field(
        max_length=MAX_ADAPTER_ROOM,
        exclude_if=is_empty,
        description="why adapters that it was told to load are not loaded",
    ),
]
AdapterSet = Annotated[
    str,
    Field(pattern=f"^{ADAPTER_SET_PATTERN}$", exclude_if=is_empty, description="the name of the set of these adapters"),
]
AssignedAdapters = Annotated[
    list[str] | None,
    Field(
        max_length=MAX_ADAPTER_ROOM,
        exclude_if=lambda value: value is None,
        description="the adapters that its engine is to hold, of those it could load; null: those that it does",
    ),
]
