"""Reads JSON bodies of the Router's own routes as pydantic models, with a sentence for whatever is wrong. Pure."""

from __future__ import annotations

from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from openai_api.json_types import json_type
from queue_schemas import BadRequest

_SHOWN_CHARS = 80
_EXPECTED = {
    "string_type": "text",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
"""pydantic's error types of a value of another type, and what the field takes."""
_SENTENCES = {
    "string_too_short": "must be text, not empty",
    "string_too_long": "must have at most {max_length} characters",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "value_error": "{error}",
}
"""Other error types of pydantic, and the rest of the sentence about the field."""


class RequestBody(BaseModel):
    """A body of a request. What a client asks for must not be dropped unseen, so unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Body = TypeVar("Body", bound=RequestBody)


def read_body_as(body: bytes, model: type[Body]) -> Body:
    """``body`` as ``model``. Raises ``BadRequest`` that names the field at fault and says what to send."""
    try:
        return model.model_validate(read_object(body))
    except ValidationError as error:
        faults = error.errors(include_url=False)
        unknown = [fault for fault in faults if fault["type"] == "extra_forbidden"]
        raise _refusal((unknown or faults)[0], model) from None


def read_object(body: bytes) -> dict[str, Any]:
    """``body`` as a JSON object. Raises ``BadRequest``."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error.msg}" if body else "the body is empty") from None
    if type(value) is not dict:
        raise BadRequest(f"the body must be a JSON object, not {json_type(value)}")
    return value


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """``openapi_extra`` of a route whose body FastAPI does not parse: it is read as ``model``, or passed on."""
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _refusal(fault: ErrorDetails, model: type[BaseModel]) -> BadRequest:
    param = ".".join(str(step)[:_SHOWN_CHARS] for step in fault["loc"])
    return BadRequest(_sentence(fault, param, model), param=param)


def _sentence(fault: ErrorDetails, param: str, model: type[BaseModel]) -> str:
    kind, given, context = fault["type"], fault["input"], fault.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{param!r} is no field here: send {', '.join(model.model_fields)}"
    if kind == "missing" or (given is None and kind in _EXPECTED):
        return f"{param} is missing"
    if kind in _EXPECTED:
        return f"{param} must be {_EXPECTED[kind]}, not {json_type(given)}"
    return f"{param} {_SENTENCES[kind].format(**context)}" if kind in _SENTENCES else f"{param}: {fault['msg']}"
