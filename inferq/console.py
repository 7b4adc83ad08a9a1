"""Writing to the terminal: people read rich text, scripts read JSON."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import orjson
from rich.console import Console

out = Console(highlight=False, soft_wrap=True)
"""Answers."""
err = Console(stderr=True, highlight=False, soft_wrap=True)
"""Progress and trouble, so that answers can be piped."""


def print_json(value: Mapping[str, object] | Sequence[object], *, line: bool = False) -> None:
    """``value`` on standard output; ``line``: on one line, at once."""
    options = orjson.OPT_APPEND_NEWLINE | (0 if line else orjson.OPT_INDENT_2)
    sys.stdout.write(orjson.dumps(value, option=options).decode())
    sys.stdout.flush()
