"""Azure's LLM inference traces: CSV with a time and the tokens of prompt and answer.

Format: https://github.com/Azure/AzurePublicDataset (Patel et al., Splitwise, ISCA 2024): a heading, then ``TIMESTAMP``
(``2023-11-16 18:15:46.6805900``), ``ContextTokens`` and ``GeneratedTokens``.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from ..requests import TraceRequest
from .reading import MalformedLine, Trace, in_order, text_lines

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def azure_trace(path: Path) -> Trace:
    """The trace in a ``.csv`` or ``.csv.gz``. Raises ``BadRequest`` with file and line where it is malformed."""
    found = in_order(path, _requests(path))
    return Trace(path.name, lambda: found)


def _requests(path: Path) -> Iterator[tuple[int, TraceRequest]]:
    for number, line in text_lines(path):
        cells = [cell.strip() for cell in line.split(",")]
        if number == 1:
            if tuple(cells[:3]) != _COLUMNS:
                raise MalformedLine(path, number, f"the heading is not {','.join(_COLUMNS)}")
            continue
        if len(cells) < 3:
            raise MalformedLine(path, number, f"{len(cells)} columns instead of 3")
        yield (
            number,
            TraceRequest(
                _seconds(path, number, cells[0]), _count(path, number, cells[1]), _count(path, number, cells[2])
            ),
        )


def _seconds(path: Path, line: int, text: str) -> float:
    """Seconds since 1970. Python's datetimes have no tenths of microseconds: the fraction is read apart."""
    whole, _, fraction = text.partition(".")
    try:
        moment = datetime.fromisoformat(whole).replace(tzinfo=UTC)
        return moment.timestamp() + float(f"0.{fraction or 0}")
    except ValueError as error:
        raise MalformedLine(path, line, f"{text!r} is no time") from error


def _count(path: Path, line: int, text: str) -> int:
    if not text.isdecimal():
        raise MalformedLine(path, line, f"{text!r} is not a count of tokens")
    return int(text)
