"""Make the id of one call to an engine."""

from __future__ import annotations

from queue_schemas import JobId
from queue_schemas.ids import random_hex


def new_call_id(job_id: JobId) -> str:
    """A fresh UUID (version 4) for one call of ``job_id``. Its digits up to the last group are those of the job id but
    for version and variant, so that an engine's log can be searched for a job.

    Not the client's own ``x-request-id``: some engines accept only UUIDs, and vLLM names the request by it, so that two
    clients with the same id, or two attempts of one job, would collide.
    """
    digits = job_id.rpartition("-")[2]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-8{digits[17:20]}-{random_hex()[:12]}"
