"""What workers may say of adapters."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from queue_schemas import Assignment, Registration, WorkerInfo
from queue_schemas.fleet.adapters import (
    MAX_ADAPTER_NAMES_BYTES,
    MAX_ADAPTER_ROOM,
    MAX_ADAPTERS,
    MAX_FAILURE_LENGTH,
    adapter_set_of,
)

BASE = {"session_id": "w.0000000000000001", "slots": 4}
REGISTRATION = BASE | {"worker_id": "w"}


def test_a_set_has_one_name() -> None:
    """In any order, however often each is named; another one for others."""
    assert adapter_set_of(["a", "b"]) == adapter_set_of(("b", "a", "b"))
    assert adapter_set_of(["a", "b"]) != adapter_set_of(["ab"])
    assert adapter_set_of([]) == ""


def test_a_worker_may_name_thousands() -> None:
    """Within a bound on their number and on all their bytes."""
    names = [f"adapter-{number:04}" for number in range(MAX_ADAPTERS)]
    assert Registration.model_validate(REGISTRATION | {"adapters": names}).adapters == names
    with pytest.raises(ValidationError, match=f"at most {MAX_ADAPTERS} items"):
        Registration.model_validate(REGISTRATION | {"adapters": [*names, "more"]})
    long = ["ä" * 100 + str(number) for number in range(MAX_ADAPTER_NAMES_BYTES // 200)]
    with pytest.raises(ValidationError, match=f"may have {MAX_ADAPTER_NAMES_BYTES} bytes in all, not"):
        Registration.model_validate(REGISTRATION | {"adapters": long})


@pytest.mark.parametrize(
    "fields",
    [
        {"adapters": ["a\nb"]},
        {"adapters": [""]},
        {"adapters": ["x" * 300]},
        {"adapters": [1]},
        {"adapters": "x"},
        {"adapter_room": -1},
        {"adapter_room": MAX_ADAPTER_ROOM + 1},
        {"adapter_base": "x" * 300},
        {"adapter_failures": {"x": "y" * (MAX_FAILURE_LENGTH + 1)}},
        {"adapter_failures": {str(number): "" for number in range(MAX_ADAPTER_ROOM + 1)}},
    ],
)
def test_what_is_absurd_is_refused(fields: dict[str, object]) -> None:
    """By the field's name."""
    with pytest.raises(ValidationError, match=next(iter(fields))):
        Registration.model_validate(REGISTRATION | fields)


def test_without_adapters_messages_are_as_they_were() -> None:
    """For those who read them in another version; an assignment that names none is not one that says nothing."""
    info = WorkerInfo.model_validate(REGISTRATION | {"assignment": {"term": 1, "version": 1}})
    said = [Registration.model_validate(REGISTRATION), info, info.assignment]
    assert not any("adapter" in one.model_dump_json() for one in said)
    assert json.loads(Assignment(term=1, version=1, adapters=[]).model_dump_json())["adapters"] == []
