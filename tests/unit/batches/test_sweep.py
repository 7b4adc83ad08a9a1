"""Marks of live batches, and who keeps them."""

from __future__ import annotations

from pathlib import Path

from batches.sweep import STRAY_MS
from queue_schemas import Tenant
from router.core.batches import keyed_batch_id
from storage import new_file_id
from storage.batches import Batches

from .scene import ACME, opened


async def test_a_mark_is_kept_until_its_batch_has_had_the_time_to_come(tmp_path: Path) -> None:
    """A batch of an old file, created under a key, has an id as old as the file: its mark, which is there a moment
    before the batch, stays nevertheless. One without a batch for an hour goes."""
    async with opened(tmp_path) as scene:
        file_id = new_file_id(int((scene.now - 86_400) * 1000))
        mark = f"live/t-{ACME}~{keyed_batch_id(Tenant(ACME), 'key', file_id)}"
        scene.shelf.store.put(mark, b"")
        batches = Batches(scene.shelf.store)
        assert scene.sweep.once() == []
        assert len(batches.live()) == 1
        scene.now += STRAY_MS / 1000 - 1
        scene.sweep.once()
        assert len(batches.live()) == 1
        scene.now += 2
        scene.sweep.once()
        assert batches.live() == []
