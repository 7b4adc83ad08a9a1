"""The objects that the batcher keeps of one batch while it runs: the checkpoint, chunks of results, merge state.

::

    <tenant>/batches/<id>/run/checkpoint             Checkpoint as JSON
    <tenant>/batches/<id>/run/chunks/<n>/<number>-*  results (:mod:`.core.results`), a thousand chunk numbers a folder
    <tenant>/batches/<id>/run/ids/...                sorted runs of ids, while the input is validated
    <tenant>/batches/<id>/run/plans/..., bits/...    the list of chunks and the merged lines, while files are written
"""

from __future__ import annotations

import secrets

from queue_schemas import Tenant
from storage import Batch, BatchStore, ObjectStore

from ..core import Checkpoint, Result, pack_chunk, unpack_chunk

_CHUNKS_IN_A_FOLDER = 1_000


class RunFolder:
    """The folder of one batch. All calls block."""

    def __init__(self, store: ObjectStore, batch: Batch) -> None:
        self._store = store
        self._tenant = Tenant(batch.request.tenant)
        self._id = batch.request.id

    def name(self, *parts: str) -> str:
        """The full name of an object in the folder."""
        return BatchStore.name(self._tenant, self._id, "/".join(("run", *parts)))

    def load(self) -> tuple[Checkpoint, bytes]:
        """The checkpoint that was saved last, parsed and as stored."""
        data = self._store.get(self.name("checkpoint"))
        return (Checkpoint(), b"") if data is None else (Checkpoint.model_validate_json(data), data)

    def save(self, data: bytes) -> None:
        """Save a checkpoint."""
        self._store.put(self.name("checkpoint"), data)

    def put_chunk(self, number: int, results: list[Result]) -> None:
        """Store a chunk. Its name is unique: two processes that store the same number both succeed."""
        name = f"{number:010d}-{secrets.token_hex(6)}"
        self._store.put(self.name("chunks", _chunk_folder(number), name), pack_chunk(results))

    def chunks(self, first: int = 0) -> list[str]:
        """The names of all chunks from this number on, in order."""
        found = []
        first_folder = _chunk_folder(first)
        for folder in self._store.names(self.name("chunks")):
            if folder >= first_folder:
                found += [f"{folder}/{name}" for name in self._store.names(self.name("chunks", folder))]
        return [name for name in found if chunk_number(name) >= first]

    def chunk(self, name: str) -> list[Result]:
        """The results of a chunk; none if it is gone."""
        data = self._store.get(self.name("chunks", name))
        return [] if data is None else unpack_chunk(data)

    def clear(self) -> None:
        """Remove everything."""
        self._store.delete_below(self.name().rstrip("/"))


def chunk_number(name: str) -> int:
    """The number in a chunk's name."""
    return int(name.rpartition("/")[2].partition("-")[0])


def _chunk_folder(number: int) -> str:
    return f"{number // _CHUNKS_IN_A_FOLDER:07d}"
