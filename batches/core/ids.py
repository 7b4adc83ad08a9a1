"""Names made from a batch's id: whoever runs the same line again uses the same ones."""

from __future__ import annotations

from hashlib import blake2b

from queue_schemas import JobId, SessionId

DIGEST_BYTES = 16


def reply_stream_of(batch_id: str) -> SessionId:
    """Where a batch's answers arrive."""
    return SessionId(f"{batch_id}.{_digest(batch_id, 'reply_stream', size=8)}")


def job_of(batch_id: str, shard: int, line: int, generation: int) -> JobId:
    """The job of a line. Another ``generation`` is another job: the one before has ended, and its answer is lost."""
    return JobId(f"{shard}-{_digest(batch_id, f'{line}/{generation}', size=16)}")


def request_of(batch_id: str, line: int) -> str:
    """What names a line's request in logs and in the output."""
    return f"batch_req_{_digest(batch_id, str(line), size=16)}"


def file_of(batch_id: str, kind: str) -> str:
    """The id of a batch's output (``kind`` "output") or error file: as old as the batch, so that it has its place
    among files by age."""
    _, _, digits = batch_id.partition("_")
    return f"file-{digits[:12]}{_digest(batch_id, kind, size=10)}"


def custom_id_digest(custom_id: str) -> bytes:
    """What stands for a ``custom_id`` where those of all lines are compared."""
    return blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


def _digest(batch_id: str, what: str, *, size: int) -> str:
    return blake2b(f"{batch_id}:{what}".encode(), digest_size=size).hexdigest()
