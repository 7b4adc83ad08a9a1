"""Writing to the terminal: people read rich text, scripts read JSON."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence

import orjson
from rich.console import Console


class PipeConsole(Console):
    """A console that leaves it to :func:`inferq.cli.main` what a reader who left the pipe means."""

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704 - called where the BrokenPipeError is handled


out = PipeConsole(highlight=False, soft_wrap=True)
"""Answers."""
err = PipeConsole(stderr=True, highlight=False, soft_wrap=True)
"""Progress and trouble, so that answers can be piped."""


_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What a terminal obeys instead of showing it, but for newline and tab."""


def visible(text: str) -> str:
    """Untrusted ``text``, safe for a terminal: characters that move its cursor or reverse text are escaped."""
    return _UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def print_json(value: Mapping[str, object] | Sequence[object], *, line: bool = False) -> None:
    """``value`` on standard output; ``line``: on one line, at once."""
    options = orjson.OPT_APPEND_NEWLINE | (0 if line else orjson.OPT_INDENT_2)
    sys.stdout.write(orjson.dumps(value, option=options).decode())
    sys.stdout.flush()
