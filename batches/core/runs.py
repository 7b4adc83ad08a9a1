"""Which ``custom_id`` stands twice in a file of millions of lines, in little memory.

Each piece of the file leaves a sorted run of fixed records, a digest and its line. Runs are then compared slice by
slice: all records whose digest begins with the same byte, from all runs.

A run is a table of 257 numbers (where the records begin whose digest starts with byte n, and where all end, counted in
records), then the records.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

from .ids import DIGEST_BYTES

RECORD = DIGEST_BYTES + 8
TABLE = struct.Struct(">257I")
SLICES = 256
MAX_RECORDS = 25_000
"""In one run: 0.6 MB, and four times as much while it is made."""


def record(digest: bytes, line: int) -> bytes:
    return digest + line.to_bytes(8, "big")


def pack_run(records: list[bytes]) -> bytes:
    """The run of these records, which are sorted in place."""
    records.sort()
    counts = [0] * SLICES
    for one in records:
        counts[one[0]] += 1
    return TABLE.pack(0, *accumulate(counts)) + b"".join(records)


def slice_bounds(table: Sequence[int], first: int, last: int) -> tuple[int, int]:
    """Where in a run the records of slices ``first`` to ``last`` (exclusive) lie: the bytes from and to."""
    return TABLE.size + table[first] * RECORD, TABLE.size + table[last] * RECORD


def repeated(parts: Iterable[bytes], most: int) -> list[tuple[int, int]]:
    """``(line, line before)`` of up to ``most`` lines whose digest stands before theirs too; ``parts`` are the same
    slices of all runs."""
    records: list[bytes] = []
    for part in parts:
        records += (part[at : at + RECORD] for at in range(0, len(part), RECORD))
    records.sort()
    found = []
    for before, after in pairwise(records):
        if before[:DIGEST_BYTES] == after[:DIGEST_BYTES]:
            found.append((_line(after), _line(before)))
            if len(found) == most:
                break
    return found


def _line(one: bytes) -> int:
    return int.from_bytes(one[DIGEST_BYTES:], "big")
