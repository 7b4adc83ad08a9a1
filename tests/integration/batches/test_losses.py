"""Whatever dies on the way: every line has one result, its own."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

from storage import Batch, BatchStatus
from tests.support.batches import ACME, BatchStorage, add_batcher, line
from tests.support.fleet import Fleet
from tests.support.servers import Server

FAST = {"sim_ttft_ms": 0, "sim_tokens_per_s": 0}


def assert_each_once(shelf: BatchStorage, batch: Batch, lines: int) -> None:
    """Every line of the input stands once in the output file, with the answer to its own question."""
    progress = batch.progress
    assert progress.status is BatchStatus.COMPLETED, progress
    assert (progress.total, progress.completed, progress.failed) == (lines, lines, 0)
    out = shelf.lines(progress.output_file_id)
    twice = [custom_id for custom_id, count in Counter(one["custom_id"] for one in out).items() if count > 1]
    assert not twice
    assert {one["custom_id"] for one in out} == {f"line-{number}" for number in range(lines)}
    for one in out:
        text = one["response"]["body"]["choices"][0]["message"]["content"]
        assert text == one["custom_id"].replace("line-", "question ")


async def test_batcher_worker_and_redis_are_killed_midway(tmp_path: Path, own_valkey: Server) -> None:
    """SIGKILL for each in turn and then for all at once, and a FLUSHALL, while the batch runs: as many results out as
    lines in, each its own; and nothing of it is left over."""
    shelf = BatchStorage(tmp_path / "store")
    lines = 4_000
    async with Fleet(tmp_path, own_valkey) as fleet:
        batcher = add_batcher(fleet, shelf)
        batcher.process.start()
        await fleet.up(workers=2, slots=16, **FAST)
        batch_id = shelf.run(line(number, max_tokens=20) for number in range(lines))
        await shelf.done(batch_id, 500)
        batcher.process.kill()
        batcher.process.start()
        await shelf.done(batch_id, 1_200)
        fleet.workers[0].process.kill()
        await shelf.done(batch_id, 1_800)
        own_valkey.restart()
        await shelf.done(batch_id, 2_400)
        await asyncio.to_thread(own_valkey.ask, "FLUSHALL")
        await shelf.done(batch_id, 3_000)
        for process in (batcher.process, fleet.workers[1].process, own_valkey.process):
            process.kill()
        own_valkey.start()
        for process in (batcher.process, fleet.workers[0].process, fleet.workers[1].process):
            process.start()
        assert_each_once(shelf, await shelf.ended(batch_id, limit_s=60), lines)
        assert shelf.batches.live() == []
        assert shelf.store.names(f"t-{ACME}/batches/{batch_id}") == ["end", "progress", "request"]
