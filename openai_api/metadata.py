"""The ``metadata`` of batches and responses: up to 16 pairs of short strings, stored and returned."""

from __future__ import annotations

from typing import cast

from queue_schemas import BadRequest

from .json_types import json_type

MAX_PAIRS, MAX_KEY_CHARS, MAX_VALUE_CHARS = 16, 64, 512


def check_metadata(value: object) -> dict[str, str] | None:
    """``value``, if it is metadata or null. Raises ``BadRequest``."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise BadRequest(f"metadata must be an object of texts, not {json_type(value)}", param="metadata")
    if len(value) > MAX_PAIRS:
        raise BadRequest(f"metadata has {len(value)} pairs: send {MAX_PAIRS} at most", param="metadata")
    for key, text in value.items():
        if len(key) > MAX_KEY_CHARS:
            raise BadRequest(
                f"metadata: the key {key[:20]!r}... has more than {MAX_KEY_CHARS} characters", param="metadata"
            )
        if not isinstance(text, str):
            raise BadRequest(f"metadata.{key} must be text, not {json_type(text)}", param=f"metadata.{key}")
        if len(text) > MAX_VALUE_CHARS:
            raise BadRequest(f"metadata.{key} has more than {MAX_VALUE_CHARS} characters", param=f"metadata.{key}")
    return cast(dict[str, str], value)
