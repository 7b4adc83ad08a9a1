"""Names the type of a parsed JSON value in error sentences."""

from __future__ import annotations

_NAMES: dict[type, str] = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "text",
    list: "an array",
    dict: "an object",
}


def json_type(value: object) -> str:
    """Such as ``a number`` or ``null``."""
    return _NAMES.get(type(value), "null")
