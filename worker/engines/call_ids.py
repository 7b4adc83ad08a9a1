"""Make the id of one call to an engine."""

from __future__ import annotations

import random

from queue_schemas import JobId

# Seeded by the system: ids must differ, between attempts of one job and between workers; they need not be secret.
_random_bits = random.Random().getrandbits


def new_call_id(job_id: JobId) -> str:
    """A fresh UUID (version 4) for one call of ``job_id``. Its digits up to the last group are those of the job id but
    for version and variant, so that an engine's log can be searched for a job.

    Not the client's own ``x-request-id``: some engines accept only UUIDs, and vLLM names the request by it, so that two
    clients with the same id, or two attempts of one job, would collide.
    """
    digits = job_id.rpartition("-")[2]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-8{digits[17:20]}-{_random_bits(48):012x}"
