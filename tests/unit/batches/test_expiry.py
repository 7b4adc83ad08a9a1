"""The file store's upkeep: what expired goes, what a live batch reads or writes stays."""

from __future__ import annotations

from pathlib import Path

from batches.core import file_of
from batches.expiry import ExpirySweep
from storage import BatchStatus, FileStore
from tests.support.batches import ACME, line

from .scene import opened


async def test_an_input_that_expires_stays_until_its_batch_has_ended(tmp_path: Path) -> None:
    """Nobody else sees it any more; the batch reads it to its end, and then it goes."""
    async with opened(tmp_path) as scene:
        batch_id = scene.submit([line(number) for number in range(60)])
        batch = await scene.until(batch_id, lambda batch: batch.progress.completed >= 20)
        files, file_id = scene.shelf.files, batch.request.input_file_id
        record = files.get(ACME, file_id, scene.now)
        assert record is not None
        files.add(record.model_copy(update={"expires_at": int(scene.now) + 1}))
        scene.now += 2
        upkeep = ExpirySweep(scene.context)
        upkeep.once()
        assert files.get(ACME, file_id, scene.now) is None
        batch = await scene.end(batch_id)
        assert (batch.progress.status, batch.progress.completed) == (BatchStatus.COMPLETED, 60)
        upkeep.once()
        assert files.get(ACME, file_id, 0) is None


async def test_leftovers_are_looked_for_once_an_hour(tmp_path: Path) -> None:
    """Old parts without a record go, but those of an output that is being written."""
    async with opened(tmp_path) as scene:
        batch_id = scene.submit([line(1)])
        output, stray = file_of(batch_id, "output"), "file-" + "0" * 32
        for file_id in (output, stray):
            scene.shelf.store.put(FileStore.part_name(ACME, file_id, 0), b"1")
        scene.now += 30 * 86_400
        upkeep = ExpirySweep(scene.context)
        upkeep.once()
        assert scene.shelf.store.get(FileStore.part_name(ACME, stray, 0)) == b"1"
        scene.context.tick_s = lambda: float("inf")
        upkeep.once()
        assert scene.shelf.store.get(FileStore.part_name(ACME, stray, 0)) is None
        assert scene.shelf.store.get(FileStore.part_name(ACME, output, 0)) == b"1"


async def test_an_ended_batch_goes_when_its_time_is_over_and_its_files_stay(tmp_path: Path) -> None:
    """[G11] After ``keep_ended_s`` its record is gone from the list and the store; the files have times of their own.
    Zero keeps all."""
    async with opened(tmp_path, keep_ended_s=3_600) as scene:
        batch = await scene.end(scene.submit([line(1)]))
        upkeep = ExpirySweep(scene.context)
        scene.now += 3_000
        upkeep.once()
        assert scene.context.batches.page(ACME)[0] == [batch]
        scene.now += 1_000
        kept = scene.context.settings
        scene.context.settings = kept.model_copy(update={"keep_ended_s": 0})
        upkeep.once()
        assert scene.context.batches.page(ACME)[0] == [batch]
        scene.context.settings = kept
        upkeep.once()
        assert scene.context.batches.page(ACME) == ([], False)
        assert batch.progress.output_file_id is not None
        assert scene.shelf.files.get(ACME, batch.progress.output_file_id, scene.now) is not None
