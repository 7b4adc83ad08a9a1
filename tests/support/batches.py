"""Batches in tests: upload files and submit batches as the Router does, and read the results."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from queue_schemas import Tenant
from storage import (
    Batch,
    BatchRequest,
    BatchStore,
    FileRecord,
    FileStore,
    ObjectStore,
    Part,
    StorageSettings,
    new_batch_id,
    new_file_id,
)

from .fleet import Fleet, Role
from .waiting import eventually

ACME = Tenant("acme")
ENDPOINT = "/v1/chat/completions"

_BATCHER = {
    "scan_interval_ms": 100,
    "step_ms": 500,
    "shared_step_ms": 100,
    "lock_ttl_ms": 1_500,
    "chunk_lines": 100,
    "chunk_ms": 1_000,
    "cancel_grace_ms": 300,
    "model_wait_ms": 10_000,
    "resend_after_ms": 3_000,
    "retry_backoff_ms": 50,
    "max_retry_backoff_ms": 500,
}
"""Settings in tests, as flags; a test may give others."""


def line(number: int, *, model: str = "sim", max_tokens: int = 1, **fields: Any) -> dict[str, Any]:
    """A line of an input file; what it asks tells it from others."""
    messages = [{"role": "user", "content": f"question {number}"}]
    body = {"model": model, "messages": messages, "max_tokens": max_tokens} | fields
    return {"custom_id": f"line-{number}", "method": "POST", "url": ENDPOINT, "body": body}


def jsonl(lines: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """As they stand in a file."""
    return (json.dumps(one).encode() + b"\n" for one in lines)


class BatchStorage:
    """The store of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = ObjectStore.open(StorageSettings(url=str(folder)))
        self.files = FileStore(self.store)
        self.batches = BatchStore(self.store)

    def upload(self, data: Iterable[bytes], tenant: Tenant = ACME) -> str:
        """A file of one part; its id."""
        now = time.time()
        file_id = new_file_id(int(now * 1000))
        name = self.files.part_name(tenant, file_id, 0)
        with self.files.upload(tenant, file_id, 1 << 40) as upload:
            for piece in data:
                upload.write(piece)
        record = FileRecord(
            id=file_id,
            tenant=tenant,
            filename="in.jsonl",
            purpose="batch",
            created_at=int(now),
            bytes=upload.size,
            parts=(Part(name=name, size=upload.size),),
        )
        self.files.add(record)
        return file_id

    def submit(
        self,
        file_id: str,
        tenant: Tenant = ACME,
        *,
        endpoint: str = ENDPOINT,
        window_s: int = 86_400,
        now_s: float = 0,
        **fields: Any,
    ) -> str:
        """A batch over a file; its id."""
        now = now_s or time.time()
        batch_id = new_batch_id(int(now * 1000))
        self.batches.create(
            BatchRequest(
                id=batch_id,
                tenant=tenant,
                input_file_id=file_id,
                endpoint=endpoint,
                completion_window="24h",
                created_at=int(now),
                expires_at=int(now) + window_s,
                **fields,
            )
        )
        return batch_id

    def run(self, lines: Iterable[Mapping[str, Any]], tenant: Tenant = ACME, **fields: Any) -> str:
        """Upload lines and submit a batch over them; its id."""
        return self.submit(self.upload(jsonl(lines), tenant), tenant, **fields)

    def batch(self, batch_id: str, tenant: Tenant = ACME) -> Batch:
        found = self.batches.get(tenant, batch_id)
        assert found is not None
        return found

    def lines(self, file_id: str | None, tenant: Tenant = ACME, *, now_s: float = 0) -> list[dict[str, Any]]:
        """What stands in a file, line by line."""
        if file_id is None:
            return []
        record = self.files.get(tenant, file_id, now_s or time.time())
        assert record is not None
        return [json.loads(one) for one in b"".join(self.files.read(record)).splitlines()]

    async def ended(self, batch_id: str, tenant: Tenant = ACME, *, limit_s: float = 30.0) -> Batch:
        """The batch, once it has ended and its mark is gone."""

        def over() -> Batch | None:
            batch = self.batch(batch_id, tenant)
            return batch if batch.ended and (tenant, batch_id) not in self.batches.live() else None

        found = await eventually(over, f"batch {batch_id} ends", limit_s=limit_s, every_s=0.03)
        assert found is not None
        return found

    async def done(self, batch_id: str, least: int, tenant: Tenant = ACME, *, limit_s: float = 30.0) -> Batch:
        """The batch, once so many of its lines have a stored result."""

        def far_enough() -> Batch | None:
            batch = self.batch(batch_id, tenant)
            return batch if batch.progress.completed + batch.progress.failed >= least else None

        found = await eventually(far_enough, f"{least} lines of {batch_id} are done", limit_s=limit_s, every_s=0.01)
        assert found is not None
        return found


def add_batcher(fleet: Fleet, shelf: BatchStorage, name: str = "batcher", **flags: object) -> Role:
    """A batcher's process over the store of a test, not started yet."""
    settings = _BATCHER | {"batcher_id": name, "redis_url": fleet.server.url, "storage_url": shelf.folder} | flags
    return fleet.add(name, "batches.service", settings)
