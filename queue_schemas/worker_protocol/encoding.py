"""The worker protocol's messages in JSON and msgpack."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from .. import codec
from ..errors import BadMessage, UnsupportedMediaType

JSON = "application/json"
MSGPACK = "application/vnd.msgpack"
MAX_CONTAINERS = 16_384
"""Lists and maps in a message of msgpack: the longest that anybody has reason to send has a quarter."""
MAX_PUNCTUATION = 2_000_000
"""Commas and opening brackets in a message of JSON, text included: a value has one at least, and takes 64 bytes."""

_M = TypeVar("_M", bound=BaseModel)


def media_type_of(content_type: str) -> str:
    """The one of the two that ``content_type`` names; JSON where it is empty. Raises ``UnsupportedMediaType``."""
    name = content_type.partition(";")[0].strip().lower() or JSON
    if name not in (JSON, MSGPACK):
        raise UnsupportedMediaType(f"send {JSON} or {MSGPACK}; nothing else is read here")
    return name


def encode(message: Mapping[str, Any], media_type: str) -> bytes:
    """``message``, in which bytes stand under ``body`` or ``data`` of objects that have, or lack, an ``encoding``."""
    if media_type == MSGPACK:
        return codec.encode(message)
    return orjson.dumps(message if _is_plain(message) else _as_json(message))


def decode(data: bytes, media_type: str, kind: type[_M]) -> _M:
    """The ``kind`` in ``data``. Raises ``BadMessage`` that names the field at fault."""
    try:
        if media_type == MSGPACK:
            return kind.model_validate(codec.decode(data, max_containers=MAX_CONTAINERS))
        return kind.model_validate(_from_json(data))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in fault["loc"]) or "the message"
        raise BadMessage(f"{where}: {fault['msg']}", param=where) from None


def _from_json(data: bytes) -> Any:
    if len(data) > MAX_PUNCTUATION and sum(map(data.count, (b",", b"[", b"{"))) > MAX_PUNCTUATION:
        raise BadMessage("the message has too many values: send it in parts, or as msgpack")
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BadMessage(f"the message is not valid JSON: {error.msg}" if data else "the message is empty") from None
    try:
        return _with_bytes(value) if b'"base64"' in data else value
    except RecursionError:
        raise BadMessage("the message is nested too deep") from None


def _with_bytes(value: Any) -> Any:
    """``value`` with the bytes that its objects of encoding ``base64`` stand for."""
    if isinstance(value, list):
        return [_with_bytes(part) for part in value]
    if not isinstance(value, dict):
        return value
    if value.get("encoding") != "base64":
        return {name: _with_bytes(part) for name, part in value.items()}
    return {name: _decoded(part) if name in ("body", "data") else _with_bytes(part) for name, part in value.items()}


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(part) for part in value]
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise BadMessage("what is said to be base64 is not: use the alphabet of RFC 4648, with padding") from None


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold ``value`` as it is."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if isinstance(value, (list, tuple)) else not isinstance(value, bytes)


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        fields = {name: _as_json(part) for name, part in value.items() if not _has_bytes(part)}
        return fields | _bytes_fields({name: part for name, part in value.items() if _has_bytes(part)})
    return [_as_json(part) for part in value] if isinstance(value, (list, tuple)) else value


def _has_bytes(value: Any) -> bool:
    return isinstance(value, bytes) or (isinstance(value, (list, tuple)) and any(isinstance(p, bytes) for p in value))


def _bytes_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of one object that have bytes, all in the same encoding."""
    if not fields:
        return {}
    try:
        return {name: _each(value, bytes.decode) for name, value in fields.items()}
    except UnicodeDecodeError:
        return {name: _each(value, _base64) for name, value in fields.items()} | {"encoding": "base64"}


def _each(value: Any, convert: Any) -> Any:
    return convert(value) if isinstance(value, bytes) else [convert(part) for part in value]


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode()
