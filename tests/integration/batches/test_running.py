"""Batches from their record to their files, by real processes."""

from __future__ import annotations

from pathlib import Path

from storage import BatchStatus
from tests.support.batches import Shelf, add_batcher, line
from tests.support.fleet import Fleet
from tests.support.servers import Server


async def test_a_batch_is_validated_run_and_written_out(tmp_path: Path, valkey: Server) -> None:
    """Each line has its answer in the output file under its custom_id; counts, stamps and usage are those of the whole;
    what was kept on the way is gone."""
    shelf = Shelf(tmp_path / "store")
    async with Fleet(tmp_path, valkey) as fleet:
        batcher = add_batcher(fleet, shelf)
        batcher.process.start()
        await fleet.up(workers=1, sim_ttft_ms=0, sim_tokens_per_s=0)
        batch_id = shelf.run(line(number) for number in range(300))
        batch = await shelf.ended(batch_id)
        progress = batch.progress
        assert progress.status is BatchStatus.COMPLETED, progress
        assert (progress.total, progress.completed, progress.failed) == (300, 300, 0)
        out = shelf.lines(progress.output_file_id)
        assert sorted(one["custom_id"] for one in out) == sorted(f"line-{n}" for n in range(300))
        assert progress.error_file_id is None
        assert batcher.process.terminate() == 0
