"""Marks of live batches, and who keeps them."""

from __future__ import annotations

from pathlib import Path

from batches.step_sweep import ORPHAN_MS
from storage import new_batch_id
from storage.batches import BatchStore

from .scene import ACME, opened


async def test_a_mark_is_kept_until_its_batch_has_had_the_time_to_come(tmp_path: Path) -> None:
    """A batch whose first try was made long ago has an id as old as that: its mark, which is there a moment before the
    batch, stays nevertheless. One without a batch for an hour goes."""
    async with opened(tmp_path) as scene:
        mark = f"live/t-{ACME}~{new_batch_id(int((scene.now - 86_400) * 1000))}"
        scene.shelf.store.put(mark, b"")
        batches = BatchStore(scene.shelf.store)
        assert scene.sweep.once() == []
        assert len(batches.live()) == 1
        scene.now += ORPHAN_MS / 1000 - 1
        scene.sweep.once()
        assert len(batches.live()) == 1
        scene.now += 2
        scene.sweep.once()
        assert batches.live() == []
