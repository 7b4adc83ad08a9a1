"""Reads typed fields of a parsed JSON request. A field of another type raises ``BadRequest`` that names it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from queue_schemas import BadRequest

Json = dict[str, Any]
"""A JSON object as it was parsed."""


def text_of(fields: Mapping[str, Any], name: str, at: str = "") -> str:
    """The text ``name``, which must be there; ``at`` is where ``fields`` stand in the request."""
    value = fields.get(name)
    if type(value) is not str:
        raise wrong(at + name, "must be text" if name in fields else "is missing; it must be text")
    return value


def optional_text(fields: Mapping[str, Any], name: str, at: str = "") -> str | None:
    """The text ``name``; None if it is null or not there."""
    return None if fields.get(name) is None else text_of(fields, name, at)


def optional_bool(fields: Mapping[str, Any], name: str) -> bool | None:
    """True or false; None if it is null or not there."""
    value = fields.get(name)
    if value is not None and type(value) is not bool:
        raise wrong(name, "must be true or false")
    return value


def optional_int(fields: Mapping[str, Any], name: str, least: int, most: int | None = None) -> int | None:
    """A whole number from ``least`` to ``most``; None if it is null or not there."""
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is not int or value < least or (most is not None and value > most):
        raise wrong(name, f"must be a whole number from {least}" + (f" to {most}" if most is not None else ""))
    return value


def optional_number(fields: Mapping[str, Any], name: str, most: float) -> float | None:
    """A number from 0 to ``most``; None if it is null or not there."""
    value = fields.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value <= most:
        raise wrong(name, f"must be a number from 0 to {most:g}")
    return float(value)


def optional_word(fields: Mapping[str, Any], name: str, words: Collection[str], at: str = "") -> str | None:
    """One of ``words``; None if it is null or not there."""
    value = fields.get(name)
    if value is not None and (type(value) is not str or value not in words):
        raise wrong(at + name, f"must be one of {', '.join(sorted(words))}")
    return value


def optional_object(fields: Mapping[str, Any], name: str, at: str = "") -> Json:
    """A JSON object; empty if it is null or not there."""
    value = fields.get(name)
    if value is None:
        return {}
    if type(value) is not dict:
        raise wrong(at + name, "must be an object")
    return value


def optional_list(fields: Mapping[str, Any], name: str, at: str = "") -> list[Any]:
    """A list; empty if it is null or not there."""
    value = fields.get(name)
    if value is None:
        return []
    if type(value) is not list:
        raise wrong(at + name, "must be a list")
    return value


def wrong(param: str, what: str) -> BadRequest:
    """The error for a parameter: ``what`` it must be, or is."""
    return BadRequest(f"{param} {what}", param=param)
