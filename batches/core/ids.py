"""Ids derived from a batch's id: running the same line again uses the same ids, so that nothing is done twice."""

from __future__ import annotations

from hashlib import blake2b

from queue_schemas import JobId, SessionId

DIGEST_BYTES = 16


def reply_stream_of(batch_id: str) -> SessionId:
    """The reply stream of a batch's jobs."""
    return SessionId(f"{batch_id}.{_digest(batch_id, 'reply_stream', size=8)}")


def job_of(batch_id: str, shard: int, line: int, generation: int) -> JobId:
    """The id of a line's job. A new ``generation`` is a new job, after the one before ended and its answer was lost."""
    return JobId(f"{shard}-{_digest(batch_id, f'{line}/{generation}', size=16)}")


def request_of(batch_id: str, line: int) -> str:
    """The request id of a line, in logs and in the output."""
    return f"batch_req_{_digest(batch_id, str(line), size=16)}"


def file_of(batch_id: str, kind: str) -> str:
    """The id of a batch's output or error file (``kind``: ``output``, ``error``). It is as old as the batch, which
    places it among the files by age."""
    _, _, digits = batch_id.partition("_")
    return f"file-{digits[:12]}{_digest(batch_id, kind, size=10)}"


def custom_id_digest(custom_id: str) -> bytes:
    """The digest of a ``custom_id``, to compare those of all lines."""
    return blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def _digest(batch_id: str, what: str, *, size: int) -> str:
    return blake2b(f"{batch_id}:{what}".encode(), digest_size=size).hexdigest()
