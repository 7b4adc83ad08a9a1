"""Print tables: whole into a pipe, fitted to a terminal by leaving columns out.

Piped, a table is as wide as its contents. On a terminal, or where ``COLUMNS`` says how wide the output is, long texts
are shortened first and the least important columns left out next; columns of rank 0 (ids) are always whole.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .console import PipeConsole, out, visible

MIN_CHARS = 12
"""A text is not shortened to fewer characters than this: rather its column is left out."""
_GAP = 2
UNLIMITED = 1 << 16


@dataclass(frozen=True, slots=True)
class Column:
    """``rank`` 0 is never left out, and the highest is left out first. ``shrinks``: it may be shortened before."""

    name: str
    rank: int = 0
    right: bool = False
    shrinks: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """The cells of a row, as plain text, and its style."""

    cells: Sequence[str]
    style: str = ""


def output_width(console: Console = out) -> int:
    """How wide a table may be there: as ``COLUMNS`` says, else as the terminal is; where there is none, any width."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns):
        return int(columns)
    return console.width if console.is_terminal else UNLIMITED


def fitted_table(columns: Sequence[Column], rows: Sequence[Row], width: int) -> Table:
    """A table that is at most ``width`` wide, unless the columns of rank 0 alone are wider."""
    shown = [[visible(cell).replace("\n", " ") for cell in row.cells] for row in rows]
    widths = [
        max([cell_len(column.name), *(cell_len(cells[place]) for cells in shown)])
        for place, column in enumerate(columns)
    ]
    kept = _fitted(columns, widths, width)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, _GAP, 0, 0))
    for place in kept:
        column = columns[place]
        table.add_column(
            column.name,
            justify="right" if column.right else "left",
            no_wrap=True,
            overflow="ellipsis",
            width=widths[place],
        )
    for row, cells in zip(rows, shown, strict=True):
        table.add_row(*(Text(cells[place]) for place in kept), style=row.style)
    return table


def print_table(columns: Sequence[Column], rows: Sequence[Row]) -> None:
    """Print a table on standard output."""
    print_whole(fitted_table(columns, rows, output_width()))


def print_whole(table: Table) -> None:
    """Print ``table`` without cutting anything that does not fit."""
    console = PipeConsole(width=UNLIMITED, highlight=False)
    if console.is_terminal:
        console.print(table, crop=False)
        return
    with console.capture() as captured:
        console.print(table, crop=False)
    # Cells are padded to the width of their column, which says nothing behind the last one.
    out.print("\n".join(line.rstrip() for line in captured.get().splitlines()), markup=False, emoji=False)


def _fitted(columns: Sequence[Column], widths: list[int], width: int) -> list[int]:
    """The places of the columns that fit; shortens those in ``widths`` that may be."""
    kept = list(range(len(columns)))
    while (excess := sum(widths[place] + _GAP for place in kept) - _GAP - width) > 0:
        longest = max(
            (place for place in kept if columns[place].shrinks), key=lambda place: widths[place], default=None
        )
        if longest is not None and widths[longest] > MIN_CHARS:
            least = max(MIN_CHARS, cell_len(columns[longest].name))
            if widths[longest] - excess >= least:
                widths[longest] -= excess
                continue
        dropped = max(
            (place for place in kept if columns[place].rank), key=lambda place: columns[place].rank, default=None
        )
        if dropped is None:
            break
        kept.remove(dropped)
    return kept
