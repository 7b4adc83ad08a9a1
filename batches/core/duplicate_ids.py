"""Find each ``custom_id`` that occurs twice in a file of millions of lines, in little memory, as an external sort does.

Each piece of the file becomes a sorted run of records of fixed size: a digest and its line. Runs are then compared
slice by slice: from all runs, the records whose digest begins with the same byte.

A run is a table of 257 numbers (the index of the first record whose digest begins with byte n, and the number of
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
"""Records of one run: 0.6 MB, and four times as much while it is being made."""


def record(digest: bytes, line: int) -> bytes:
    """One record: the digest of a custom id, and its line."""
    return digest + line.to_bytes(8, "big")


def pack_run(records: list[bytes]) -> bytes:
    """The run of these records; sorts them in place."""
    records.sort()
    counts = [0] * SLICES
    for one in records:
        counts[one[0]] += 1
    return TABLE.pack(0, *accumulate(counts)) + b"".join(records)


def slice_bounds(table: Sequence[int], first: int, last: int) -> tuple[int, int]:
    """The bytes, from and to, of a run's slices ``first`` to ``last`` (exclusive)."""
    return TABLE.size + table[first] * RECORD, TABLE.size + table[last] * RECORD


def find_duplicates(parts: Iterable[bytes], max_count: int) -> list[tuple[int, int]]:
    """``(line, earlier line)`` of up to ``max_count`` lines that share their digest with an earlier line; ``parts`` are
    the same slices of all runs."""
    records: list[bytes] = []
    for part in parts:
        records += (part[at : at + RECORD] for at in range(0, len(part), RECORD))
    records.sort()
    found = []
    for before, after in pairwise(records):
        if before[:DIGEST_BYTES] == after[:DIGEST_BYTES]:
            found.append((_line(after), _line(before)))
            if len(found) == max_count:
                break
    return found


def _line(one: bytes) -> int:
    return int.from_bytes(one[DIGEST_BYTES:], "big")
