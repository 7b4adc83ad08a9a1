"""Batches with near deadlines beside batches that fill every slot, by real processes."""

from __future__ import annotations

from pathlib import Path

from storage import BatchStatus
from tests.support.batches import BatchStorage, add_batcher, line
from tests.support.fleet import Fleet
from tests.support.servers import Server

WINDOW_S = 40
LINE = {"max_tokens": 10, "ignore_eos": True}
"""Takes a quarter of a second."""


async def test_a_near_deadline_is_met_behind_a_batch_that_came_first(tmp_path: Path, valkey: Server) -> None:
    """300 lines in 40 s, behind a batch with a day to go that has 512 lines on the queue and would take half of 16
    lines a second: sharing evenly it would be late. The earlier batch keeps a share, and all of it afterwards."""
    shelf = BatchStorage(tmp_path / "store")
    async with Fleet(tmp_path, valkey) as fleet:
        add_batcher(fleet, shelf).process.start()
        await fleet.up(workers=1, slots=4, sim_ttft_ms=10, sim_tokens_per_s=40)
        long = shelf.run(line(number, **LINE) for number in range(5_000))
        await shelf.done(long, 60)
        before = shelf.batch(long).progress.completed
        short = shelf.run((line(number, **LINE) for number in range(300)), window_s=WINDOW_S)
        ended = await shelf.ended(short, limit_s=WINDOW_S + 20)
        assert (ended.progress.status, ended.progress.completed) == (BatchStatus.COMPLETED, 300)
        progress = shelf.batch(long).progress
        assert progress.completed - before >= 10, "the other has its share"
        await shelf.done(long, progress.completed + 100)
