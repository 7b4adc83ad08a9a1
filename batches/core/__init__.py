"""Decisions about batches, without I/O: reading lines, matching answers to them, results, merging, the checkpoint."""

from __future__ import annotations

from .checkpoint import MAX_ERRORS, Checkpoint, MergeState, OpenLine, Phase
from .duplicate_ids import MAX_RECORDS, RECORD, SLICES, TABLE, find_duplicates, pack_run, record, slice_bounds
from .ids import custom_id_digest, file_of, job_of, reply_stream_of, request_of
from .jsonl import BadLine, BatchLine, LineRequest, LineSplitter, RawLine, read_line, request_in
from .merging import LineBitmap, MergedLines
from .results import USAGE, Result, answered, pack_chunk, unanswered, unpack_chunk
from .window import Answer, EndedJob, JobWindow, entry_order

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
    "Checkpoint",
    "EndedJob",
    "JobWindow",
    "LineBitmap",
    "LineRequest",
    "LineSplitter",
    "MergeState",
    "MergedLines",
    "OpenLine",
    "Phase",
    "RawLine",
    "Result",
    "answered",
    "custom_id_digest",
    "entry_order",
    "file_of",
    "find_duplicates",
    "job_of",
    "pack_chunk",
    "pack_run",
    "read_line",
    "record",
    "reply_stream_of",
    "request_in",
    "request_of",
    "slice_bounds",
    "unanswered",
    "unpack_chunk",
]
