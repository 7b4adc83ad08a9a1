"""Read figures out of an engine's metrics page: Prometheus text, which its own parser may not have checked.

Used by :mod:`.engine_load` for vLLM and by the dialects of other engines; a figure that cannot be is none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

MAX_REQUESTS = 1_000_000
"""More than any engine holds: a page that says more is wrong."""
MAX_TOTAL = 2**53


def sample_pattern(*names: str) -> re.Pattern[bytes]:
    """What finds the samples called ``names`` (regular expressions) on a page: name, labels in braces, value."""
    return re.compile(rb"^(" + "|".join(names).encode() + rb")(\{[^\n]*\})? ([^ \r\n]{1,40})", re.MULTILINE)


def read_samples(pattern: re.Pattern[bytes], page: bytes) -> dict[str, list[float]]:
    """The values that ``page`` tells by name, one for each set of labels; NaN for one that is no number."""
    values: dict[str, list[float]] = {}
    for name, _, text in pattern.findall(page):
        values.setdefault(name.decode(), []).append(number(text))
    return values


def number(text: bytes) -> float:
    """A sample's value; NaN where it is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def total(values: Sequence[float], most: int) -> int | None:
    """The sum, or None without values or with one that cannot be."""
    if not values or not all(0 <= value <= most for value in values):
        return None
    return int(sum(values))


def fullest(values: Sequence[float]) -> float | None:
    """The largest of several shares (0 to 1), or None without values or with one that cannot be."""
    return max(values) if values and all(0 <= value <= 1 for value in values) else None
