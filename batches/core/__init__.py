"""What a batch decides, without I/O."""

from __future__ import annotations

from .ids import custom_id_digest, file_of, job_of, reply_stream_of, request_of
from .jsonl import BadLine, BatchLine, LineCutter, RawLine, id_and_body, read_line
from .merging import Bits, Fold
from .results import USAGE, Result, answered, pack_chunk, unanswered, unpack_chunk
from .runs import MAX_RECORDS, RECORD, SLICES, TABLE, pack_run, record, repeated, slice_bounds
from .window import Answer, Ended, Window, entry_order
from .work import MAX_ERRORS, Merge, OpenLine, Phase, Work

__all__ = [
    "MAX_ERRORS",
    "MAX_RECORDS",
    "RECORD",
    "SLICES",
    "TABLE",
    "USAGE",
    "Answer",
    "BadLine",
    "BatchLine",
    "Bits",
    "Ended",
    "Fold",
    "LineCutter",
    "Merge",
    "OpenLine",
    "Phase",
    "RawLine",
    "Result",
    "Window",
    "Work",
    "answered",
    "custom_id_digest",
    "entry_order",
    "file_of",
    "id_and_body",
    "job_of",
    "pack_chunk",
    "pack_run",
    "read_line",
    "record",
    "repeated",
    "reply_stream_of",
    "request_of",
    "slice_bounds",
    "unanswered",
    "unpack_chunk",
]
