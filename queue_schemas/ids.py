"""Ids of jobs, sessions, tenants and pools as distinct types, with the checks of their form.

A job id is ``<shard>-<32 hex digits>``: the shard that holds the job, then 128 random bits, so that whoever
holds an id can address the job without a lookup.
"""

from __future__ import annotations

import os
import re
import secrets
import zlib
from functools import lru_cache
from typing import NewType
from urllib.parse import quote, unquote

from .errors import BadMessage

JobId = NewType("JobId", str)
WorkerId = NewType("WorkerId", str)
SessionId = NewType("SessionId", str)
"""One start of one worker or router: ``<name>.<16 hex digits>``. A restart is a new session_id."""
Pool = NewType("Pool", str)
"""A model id as the engine lists it: all workers that serve it form the pool."""
Tenant = NewType("Tenant", str)

MAX_NAME_BYTES = 256
"""Longest model, tenant or worker name accepted, in UTF-8 bytes."""
MAX_REGION_LENGTH = 100

_JOB_ID = re.compile(r"(0|[1-9][0-9]{0,3})-[0-9a-f]{32}")
WORKER_ID_PATTERN = "[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
SESSION_ID_PATTERN = WORKER_ID_PATTERN + r"\.[0-9a-f]{16}"
_WORKER_ID = re.compile(WORKER_ID_PATTERN)
_SESSION_ID = re.compile(SESSION_ID_PATTERN)


def random_hex() -> str:
    """128 random bits of the operating system's as 32 hex digits. They are fetched in blocks: a system call costs more
    than all else about an id."""
    try:
        return _unused.pop()
    except IndexError:
        block = secrets.token_hex(_BLOCK_BYTES)
        ids = [block[start : start + 32] for start in range(0, len(block), 32)]
        taken = ids.pop()
        _unused.extend(ids)
        return taken


_BLOCK_BYTES = 4096
_unused: list[str] = []
if hasattr(os, "register_at_fork"):  # else both processes would go on with the same
    os.register_at_fork(after_in_child=_unused.clear)


def new_job_id(shard: int) -> JobId:
    """A fresh id for a job that will live on ``shard``."""
    return JobId(f"{shard}-{random_hex()}")


def shard_of_job(job_id: str) -> int:
    """The shard inside a job id. Raises ``BadMessage`` for anything that is not a job id."""
    if not _JOB_ID.fullmatch(job_id):
        raise BadMessage(f"not a job id: {job_id[:60]!r}")
    return int(job_id.partition("-")[0])


def shard_of_pool(pool: str, shards: int) -> int:
    """The home shard of a pool: CRC-32 of the model id modulo ``shards``, the same in every process."""
    return zlib.crc32(pool.encode()) % shards


def new_session_id(name: str) -> SessionId:
    """A fresh session id of the worker or router called ``name``."""
    return SessionId(f"{check_worker_id(name)}.{random_hex()[:16]}")


def check_session_id(value: str) -> SessionId:
    """``value`` if it has the shape of a session id, else ``BadMessage``."""
    if not _SESSION_ID.fullmatch(value):
        raise BadMessage(f"not a session id: {value[:90]!r}; expected NAME.<16 hex digits>")
    return SessionId(value)


def check_worker_id(value: str) -> WorkerId:
    """``value`` if it may name a worker, else ``BadMessage`` with the rule."""
    if not _WORKER_ID.fullmatch(value):
        raise BadMessage(
            f"not a worker id: {value[:80]!r}; use 1 to 63 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit"
        )
    return WorkerId(value)


def check_name(value: str, what: str) -> str:
    """``value`` if it may be a model or tenant name (1 to 256 bytes, no control characters), else ``BadMessage``."""
    if not value or len(value.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES or not value.isprintable():
        raise BadMessage(f"{what} must be 1 to {MAX_NAME_BYTES} bytes of printable text")
    return value


def check_region(value: str) -> str:
    """``value`` if it may name a region (1 to 100 printable characters) or is empty, which is none; else
    ``BadMessage``."""
    if len(value) > MAX_REGION_LENGTH or not value.isprintable():
        raise BadMessage(f"region must be at most {MAX_REGION_LENGTH} characters of printable text")
    return value


@lru_cache(4096)
def encode_name(name: str) -> str:
    """A name as it stands inside a key: percent-encoded, so that ``:``, ``@``, ``{`` and ``}`` change nothing
    there."""
    return quote(name, safe="")


@lru_cache(4096)
def decode_name(part: str) -> str:
    """The inverse of :func:`encode_name`."""
    return unquote(part)
