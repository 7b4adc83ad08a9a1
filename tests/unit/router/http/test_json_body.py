"""JSON bodies of the Router's own routes: what is wrong with them is one sentence about one field."""

from __future__ import annotations

from typing import Any, Literal

import orjson
import pytest
from pydantic import Field, field_validator

from queue_schemas import BadRequest
from router.http.json_body import RequestBody, body_schema, read_body_as


class Inner(RequestBody):
    kind: Literal["a", "b"]


class Body(RequestBody):
    name: str = Field(min_length=1, max_length=3)
    count: int | None = Field(None, ge=1, le=9)
    on: bool = False
    inner: Inner | None = None
    names: list[str] | None = None

    @field_validator("on")
    @classmethod
    def _off(cls, value: bool) -> bool:
        if value:
            raise ValueError("must be off today")
        return value


@pytest.mark.parametrize(
    ("fields", "param", "sentence"),
    [
        ({}, "name", "name is missing"),
        ({"name": None}, "name", "name is missing"),
        ({"name": 7}, "name", "name must be text, not a number"),
        ({"name": ""}, "name", "name must be text, not empty"),
        ({"name": "long"}, "name", "name must have at most 3 characters"),
        ({"name": "x", "count": 1.5}, "count", "count must be a whole number, not a number"),
        ({"name": "x", "count": True}, "count", "count must be a whole number, not a boolean"),
        ({"name": "x", "count": 0}, "count", "count must be at least 1"),
        ({"name": "x", "count": 10}, "count", "count must be at most 9"),
        ({"name": "x", "on": 1}, "on", "on must be true or false, not a number"),
        ({"name": "x", "on": True}, "on", "on must be off today"),
        ({"name": "x", "inner": "a"}, "inner", "inner must be an object, not text"),
        ({"name": "x", "inner": {"kind": "c"}}, "inner.kind", "inner.kind must be 'a' or 'b'"),
        ({"name": "x", "inner": {}}, "inner.kind", "inner.kind is missing"),
        ({"name": "x", "names": "x"}, "names", "names must be a list, not text"),
        ({"name": "x", "names": [7]}, "names.0", "names.0 must be text, not a number"),
        ({"nam": "x"}, "nam", "'nam' is no field here: send name, count, on, inner, names"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str, sentence: str) -> None:
    """And the sentence says what it takes."""
    with pytest.raises(BadRequest) as refused:
        read_body_as(orjson.dumps(fields), Body)
    assert (refused.value.param, refused.value.message) == (param, sentence)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff"])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    """As one sentence about the body."""
    with pytest.raises(BadRequest, match="the body"):
        read_body_as(body, Body)


def test_the_document_shows_what_is_read() -> None:
    """The schema in the OpenAPI document is that of the model that reads the body."""
    schema = body_schema(Body)["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["name"]
    assert schema["additionalProperties"] is False
