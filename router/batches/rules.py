"""Which batches this Router accepts: endpoints, completion windows, input files. Pure.

Fields and limits are those of OpenAI's API reference (Batches, 2026-08).
"""

from __future__ import annotations

import re
from collections.abc import Collection

from openai_api.paths import INFERENCE_PATHS, MULTIPART_PATHS
from queue_schemas import BadRequest
from storage import FileRecord

from ..http.json_body import read_body_as
from .schemas import BatchCreate

INPUT_PURPOSE = "batch"
_ID = re.compile(r"batch_[0-9a-f]{32}")


def batch_endpoints(paths: Collection[str]) -> tuple[str, ...]:
    """Those of a Router's inference ``paths`` that a batch may use: all that take JSON, well-known ones first."""
    known = [path for path in INFERENCE_PATHS if path in paths]
    return tuple(path for path in [*known, *sorted(set(paths) - set(known))] if path not in MULTIPART_PATHS)


def read_batch(body: bytes, endpoints: Collection[str], windows: Collection[str]) -> BatchCreate:
    """The batch that ``body`` asks for. Raises ``BadRequest`` that names the field at fault."""
    params = read_body_as(body, BatchCreate)
    if params.endpoint not in endpoints:
        raise BadRequest(
            f"endpoint {params.endpoint[:80]!r} cannot be used by a batch: choose {_listed(endpoints)}",
            param="endpoint",
        )
    if params.completion_window not in windows:
        raise BadRequest(
            f"completion_window {params.completion_window[:80]!r} is not offered here: choose {_listed(windows)}",
            param="completion_window",
        )
    return params


def check_batch_cursor(after: str) -> str:
    """``after`` of a list: the id of a batch, or nothing. Raises ``BadRequest``."""
    if after and not _ID.fullmatch(after):
        raise BadRequest(
            f"after {after[:80]!r} is not the id of a batch: give the last id of the page before", param="after"
        )
    return after


def check_input_file(file_id: str, record: FileRecord | None, max_bytes: int) -> None:
    """Whether a batch can read the file that its tenant knows as ``file_id``. Raises ``BadRequest``."""
    if record is None:
        fault = f"no file {file_id[:80]!r} found for this API key: upload it with POST /v1/files"
    elif record.purpose != INPUT_PURPOSE:
        fault = f"the file was uploaded with purpose {record.purpose!r}: upload it with purpose {INPUT_PURPOSE!r}"
    elif record.bytes == 0:
        fault = "the file is empty: a batch needs at least one line"
    elif record.bytes > max_bytes:
        fault = f"the file has {record.bytes} bytes, more than the {max_bytes} of a batch: split it into several"
    else:
        return
    raise BadRequest(fault, param="input_file_id")


def _listed(words: Collection[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last
