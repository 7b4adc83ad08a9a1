"""What the steps of all batches work with, and where a batch's own objects lie."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from broker import Broker
from queue_schemas import BrokerUnavailable, Tenant
from storage import Batch, Batches, FileRecord, Files, ObjectStore

from .core import Result, Work, pack_chunk, unpack_chunk
from .metrics import BatchMetrics
from .settings import BatchSettings

_CHUNKS_IN_A_FOLDER = 1_000


@dataclass(slots=True)
class BatchContext:
    """The store, the queue, the settings. ``now_s`` is the wall clock, ``tick_s`` a monotonic one. ``broker`` is None
    while the queue cannot be reached, for the reason ``why``."""

    settings: BatchSettings
    input_bytes: int
    """The largest input file, in bytes."""
    store: ObjectStore
    metrics: BatchMetrics
    now_s: Callable[[], float]
    tick_s: Callable[[], float]
    broker: Broker | None = None
    why: str = "not connected yet"
    stopping: bool = False
    """The process is to end: so is the step that runs."""

    @property
    def files(self) -> Files:
        return Files(self.store)

    @property
    def batches(self) -> Batches:
        return Batches(self.store)

    def queue(self) -> Broker:
        """The queue. Raises ``BrokerUnavailable``."""
        if self.broker is None:
            raise BrokerUnavailable(f"the queue cannot be reached: {self.why}", retry_after_s=2)
        return self.broker


class Folder:
    """The batcher's own objects of one batch. All calls block."""

    def __init__(self, store: ObjectStore, batch: Batch) -> None:
        self._store = store
        self._tenant = Tenant(batch.request.tenant)
        self._id = batch.request.id

    def name(self, *parts: str) -> str:
        return Batches.name(self._tenant, self._id, "/".join(("run", *parts)))

    def load(self) -> tuple[Work, bytes]:
        """The work as it was left, and as it lies there."""
        data = self._store.get(self.name("work"))
        return (Work(), b"") if data is None else (Work.model_validate_json(data), data)

    def save(self, data: bytes) -> None:
        self._store.put(self.name("work"), data)

    def put_chunk(self, number: int, results: list[Result]) -> None:
        """Store a chunk under a name that nobody else gives."""
        name = f"{number:010d}-{secrets.token_hex(6)}"
        self._store.put(self.name("chunks", _chunk_folder(number), name), pack_chunk(results))

    def chunks(self, first: int = 0) -> list[str]:
        """The names of all chunks from this number on, in order."""
        found = []
        least = _chunk_folder(first)
        for folder in self._store.names(self.name("chunks")):
            if folder >= least:
                found += [f"{folder}/{name}" for name in self._store.names(self.name("chunks", folder))]
        return [name for name in found if chunk_number(name) >= first]

    def chunk(self, name: str) -> list[Result]:
        """What a chunk holds; nothing if it is gone."""
        data = self._store.get(self.name("chunks", name))
        return [] if data is None else unpack_chunk(data)

    def clear(self) -> None:
        """Remove everything."""
        self._store.delete_below(self.name().rstrip("/"))


def chunk_number(name: str) -> int:
    """The number within a chunk's name."""
    return int(name.rpartition("/")[2].partition("-")[0])


def _chunk_folder(number: int) -> str:
    return f"{number // _CHUNKS_IN_A_FOLDER:07d}"


def input_of(files: Files, batch: Batch) -> FileRecord | None:
    """The input file, if it is there still. One that expires while its batch runs is kept until that has ended."""
    return files.get(Tenant(batch.request.tenant), batch.request.input_file_id, now_s=0)
