"""The ``completion_window`` of a batch, such as ``24h``."""

from __future__ import annotations

import re

MAX_WINDOW_S = 30 * 86_400
_WINDOW = re.compile(r"([1-9][0-9]{0,4})([mhd])")
_UNIT_S = {"m": 60, "h": 3_600, "d": 86_400}


def window_seconds(window: str) -> int:
    """``30m``, ``24h``, ``7d`` in seconds. Raises ``ValueError`` with a sentence."""
    found = _WINDOW.fullmatch(window)
    seconds = int(found[1]) * _UNIT_S[found[2]] if found else 0
    if not 0 < seconds <= MAX_WINDOW_S:
        raise ValueError(f"{window!r} is no completion window: write a number and m, h or d, up to 30d, as in 24h")
    return seconds
