"""Structured outputs: which shape a request asks of its answer, and a text of that shape.

Understands ``response_format`` and, as vLLM does, ``structured_outputs`` and the older ``guided_*`` fields.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from .refusal import Fields, RefusedRequest

MAX_NESTING = 64
MAX_SCHEMA_BYTES = 256 * 1024
MAX_PROMPTED = 64
"""Places of a prompt that are looked at for the beginning of a schema."""
_PLAIN_OBJECT = b'{"type":"object","properties":{"answer":{"type":"string"}},"required":["answer"]}'
_KINDS = ("json", "json_object", "regex", "choice", "grammar")
_OPTIONS = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern", "disable_fallback")


@dataclass(frozen=True, slots=True)
class Shape:
    """What an answer must be: an instance of a JSON schema, one of several texts (``constraint`` is a JSON list), or a
    match of a regular expression or a grammar. ``param`` is the field of the request that asks for it."""

    kind: Literal["json", "regex", "choice", "grammar"]
    constraint: str
    param: str


def shape_of(fields: Fields, prompt: str) -> Shape | None:
    """The shape that a chat, a completion or a response asks for; None for plain text. In JSON mode, which has no
    schema of its own, it is that of a schema in the prompt, as clients write it there for a model to read."""
    found = [shape for shape in (_of_format(fields, prompt), *_of_structured(fields)) if shape is not None]
    if len(found) > 1:
        both = " and ".join(shape.param for shape in found)
        raise RefusedRequest(f"{both} both say what the answer must be: give one of them", param=found[1].param)
    return found[0] if found else None


def json_shape(schema: Any, param: str) -> Shape:
    """An instance of ``schema``, a parsed JSON schema."""
    if not isinstance(schema, dict):
        raise RefusedRequest(f"{param}: Input should be a JSON schema, which is an object", param=param)
    if not _is_shallow(schema):
        raise RefusedRequest(f"{param}: the schema is nested more than {MAX_NESTING} levels deep", param=param)
    text = orjson.dumps(schema)
    if len(text) > MAX_SCHEMA_BYTES:
        raise RefusedRequest(f"{param}: the schema is longer than {MAX_SCHEMA_BYTES} bytes", param=param)
    return Shape("json", text.decode(), param)


def shaped_text(shape: Shape, key: bytes) -> str:
    """A text of that shape, the same for the same ``key``. Raises :class:`RefusedRequest` if there is none."""
    drawn = hashlib.blake2b(key, digest_size=16).hexdigest()
    if shape.kind == "choice":
        choices: list[str] = orjson.loads(shape.constraint)
        return choices[int(drawn, 16) % len(choices)]
    try:
        from .schema_instances import CannotSatisfy, json_instance, matching_text  # noqa: PLC0415 - loaded when needed
    except ImportError as error:
        raise RefusedRequest(
            f"{shape.param}: the simulated engine needs the packages llguidance and jsonschema for it ({error})",
            param=shape.param,
        ) from error
    try:
        if shape.kind == "json":
            return json_instance(shape.constraint, drawn)
        return matching_text(shape.kind, shape.constraint, drawn)
    except CannotSatisfy as error:
        raise RefusedRequest(f"{shape.param}: {error}", param=shape.param) from error


def _of_format(fields: Fields, prompt: str) -> Shape | None:
    asked = fields.get("response_format")
    if asked is None:
        return None
    kind = asked.get("type") if isinstance(asked, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return _prompted_shape(prompt) or Shape("json", _PLAIN_OBJECT.decode(), "response_format")
    if kind == "json_schema":
        inner = asked.get("json_schema")
        schema = inner.get("schema", inner.get("json_schema")) if isinstance(inner, dict) else None
        return json_shape(schema, "response_format.json_schema.schema")
    raise RefusedRequest(
        "response_format: type should be 'text', 'json_object' or 'json_schema' on a simulated engine",
        param="response_format",
    )


def _prompted_shape(prompt: str) -> Shape | None:
    """The last JSON schema of an object that ``prompt`` contains, if it can be met."""
    found, decoder, at = None, json.JSONDecoder(), -1
    for _ in range(MAX_PROMPTED):
        at = prompt.find("{", at + 1, MAX_SCHEMA_BYTES)
        if at < 0:
            break
        try:
            value, end = decoder.raw_decode(prompt, at)
        except (ValueError, RecursionError):
            continue
        at = end - 1
        if isinstance(value.get("properties"), dict):
            found = value
    if found is None:
        return None
    try:
        shape = json_shape(found, "response_format")
        shaped_text(shape, b"")
    except RefusedRequest:
        return None
    return shape


def _of_structured(fields: Fields) -> list[Shape]:
    asked = fields.get("structured_outputs")
    if asked is not None and not isinstance(asked, dict):
        raise RefusedRequest("structured_outputs: Input should be a valid dictionary", param="structured_outputs")
    given = {f"structured_outputs.{name}": value for name, value in (asked or {}).items() if value is not None}
    given |= {f"guided_{kind}": fields[f"guided_{kind}"] for kind in _KINDS if fields.get(f"guided_{kind}") is not None}
    found = []
    for param, value in given.items():
        kind = param.removeprefix("structured_outputs.").removeprefix("guided_")
        if kind not in (*_KINDS, *_OPTIONS):
            raise RefusedRequest(f"{param} is not supported by a simulated engine", param=param)
        if kind in _KINDS and value is not False:
            found.append(_constrained(kind, value, param))
    return found


def _constrained(kind: str, value: Any, param: str) -> Shape:
    if kind == "json_object":
        return Shape("json", _PLAIN_OBJECT.decode(), param)
    if kind == "json":
        if isinstance(value, str):
            try:
                value = orjson.loads(value)
            except orjson.JSONDecodeError as error:
                raise RefusedRequest(f"{param}: the schema is not valid JSON: {error}", param=param) from error
        return json_shape(value, param)
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
            raise RefusedRequest(f"{param}: Input should be a list of at least one string", param=param)
        return Shape("choice", orjson.dumps(value).decode(), param)
    if not isinstance(value, str) or not value or len(value) > MAX_SCHEMA_BYTES:
        raise RefusedRequest(f"{param}: Input should be a string of 1 to {MAX_SCHEMA_BYTES} bytes", param=param)
    if kind == "regex":
        # The whole answer matches, so anchors at its ends say nothing more.
        return Shape("regex", re.sub(r"(?<!\\)\$$", "", value.removeprefix("^")), param)
    return Shape("grammar", value, param)


def _is_shallow(schema: Any) -> bool:
    level = [schema]
    for _ in range(MAX_NESTING):
        level = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]
        level = [part for part in level if isinstance(part, dict | list)]
        if not level:
            return True
    return False
