"""What may be asked of ``POST /v1/batches``: the body read, with a sentence for everything that is wrong with it.

Fields, limits and words are those of the vendor's API reference (Batches, 2026-08). A field that is not known is
refused: what a client asks for must not be dropped unseen.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from openai_api.paths import INFERENCE_PATHS, MULTIPART_PATHS
from queue_schemas import BadRequest

from ..http.rules import json_type, read_object

MAX_PAIRS, KEY_CHARS, VALUE_CHARS = 16, 64, 512
MIN_EXPIRY_S, MAX_EXPIRY_S = 3_600, 2_592_000
MAX_WINDOW_S = 30 * 86_400

_FIELDS = frozenset({"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"})
_WINDOW = re.compile(r"([1-9][0-9]{0,4})([mhd])")
_UNIT_S = {"m": 60, "h": 3_600, "d": 86_400}
_ID = re.compile(r"batch_[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class BatchParams:
    """What the body says. ``window_s``: how long the batch may take; ``output_expiry_s``: how long its output stays,
    None if it does not say."""

    input_file_id: str
    endpoint: str
    completion_window: str
    window_s: int
    metadata: dict[str, str] | None = None
    output_expiry_s: int | None = None


def window_seconds(window: str) -> int:
    """``30m``, ``24h``, ``7d`` in seconds. Raises ``ValueError`` with a sentence."""
    found = _WINDOW.fullmatch(window)
    seconds = int(found[1]) * _UNIT_S[found[2]] if found else 0
    if not 0 < seconds <= MAX_WINDOW_S:
        raise ValueError(f"{window!r} is no completion window: write a number and m, h or d, up to 30d, as in 24h")
    return seconds


def batch_endpoints(paths: Collection[str]) -> tuple[str, ...]:
    """Those of a Router's paths that a batch can ask: all that take JSON, in the order in which people know them."""
    known = [path for path in INFERENCE_PATHS if path in paths]
    return tuple(path for path in [*known, *sorted(set(paths) - set(known))] if path not in MULTIPART_PATHS)


def read_batch(body: bytes, endpoints: Collection[str], windows: Collection[str]) -> BatchParams:
    """The batch that ``body`` asks for. Raises ``BadRequest`` that names the field at fault."""
    asked = read_object(body)
    unknown = sorted(asked.keys() - _FIELDS)
    if unknown:
        raise BadRequest(
            f"{unknown[0][:80]!r} is no field of a batch: send {_listed(sorted(_FIELDS))}", param=unknown[0][:80]
        )
    endpoint = _text(asked, "endpoint")
    if endpoint not in endpoints:
        raise BadRequest(
            f"endpoint {endpoint[:80]!r} cannot be asked by a batch: choose {_listed(endpoints)}", param="endpoint"
        )
    window = _text(asked, "completion_window")
    if window not in windows:
        raise BadRequest(
            f"completion_window {window[:80]!r} is not offered here: choose {_listed(windows)}",
            param="completion_window",
        )
    return BatchParams(
        _text(asked, "input_file_id"),
        endpoint,
        window,
        window_seconds(window),
        read_metadata(asked.get("metadata")),
        _output_expiry(asked.get("output_expires_after")),
    )


def read_metadata(value: object) -> dict[str, str] | None:
    """Up to 16 pairs of text. Raises ``BadRequest``."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise BadRequest(f"metadata must be an object of texts, not {json_type(value)}", param="metadata")
    if len(value) > MAX_PAIRS:
        raise BadRequest(f"metadata has {len(value)} pairs: {MAX_PAIRS} are the most", param="metadata")
    for key, text in value.items():
        if len(key) > KEY_CHARS:
            raise BadRequest(
                f"metadata: the key {key[:20]!r}... has more than {KEY_CHARS} characters", param="metadata"
            )
        if not isinstance(text, str):
            raise BadRequest(f"metadata.{key} must be text, not {json_type(text)}", param=f"metadata.{key}")
        if len(text) > VALUE_CHARS:
            raise BadRequest(f"metadata.{key} has more than {VALUE_CHARS} characters", param=f"metadata.{key}")
    return value


def check_batch_cursor(after: str) -> str:
    """``after`` of a list: the id of a batch, or nothing. Raises ``BadRequest``."""
    if after and not _ID.fullmatch(after):
        raise BadRequest(
            f"after {after[:80]!r} is not the id of a batch: give the last id of the page before", param="after"
        )
    return after


def _text(asked: Mapping[str, Any], name: str) -> str:
    value = asked.get(name)
    if isinstance(value, str) and value:
        return value
    if value is None:
        raise BadRequest(f"{name} is missing", param=name)
    raise BadRequest(f"{name} must be text, not {'empty' if value == '' else json_type(value)}", param=name)


def _output_expiry(value: object) -> int | None:
    if value is None:
        return None
    param = "output_expires_after"
    if not isinstance(value, dict) or value.keys() != {"anchor", "seconds"} or value["anchor"] != "created_at":
        raise BadRequest(f'{param} must be {{"anchor": "created_at", "seconds": ...}}', param=param)
    seconds = value["seconds"]
    if type(seconds) is not int or not MIN_EXPIRY_S <= seconds <= MAX_EXPIRY_S:
        raise BadRequest(
            f"{param}.seconds must be a whole number from {MIN_EXPIRY_S} to {MAX_EXPIRY_S}",
            param=f"{param}.seconds",
        )
    return seconds


def _listed(words: Collection[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last
