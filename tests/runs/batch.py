"""A batch of any size, from its upload to its files, alone or with everything killed midway.

``python -m tests.runs.batch --lines 50000 --kill`` (batcher, worker and Redis, each once and then all at once);
``--lines 5000 --lines 500000`` for a table of sizes: rate, and the most memory that batcher and Redis had.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from storage import Batch, BatchStatus
from tests.support.batches import ACME, BatchStorage, add_batcher, jsonl, line
from tests.support.fleet import Fleet, Role
from tests.support.servers import Server, server_binary

_HEAD = ("lines", "input MB", "kills", "s", "lines/s", "batcher MiB", "Redis MiB", "in the output", "twice", "missing")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run found."""

    lines: int
    input_mb: float
    kills: int
    seconds: float
    batcher_mib: float
    redis_mib: float
    output: int
    twice: int
    missing: int

    def row(self) -> tuple[str, ...]:
        rate = f"{self.lines / self.seconds:,.0f}"
        memory = (f"{self.batcher_mib:.0f}", f"{self.redis_mib:.0f}")
        found = (f"{self.output:,}", str(self.twice), str(self.missing))
        return (
            f"{self.lines:,}",
            f"{self.input_mb:.0f}",
            str(self.kills),
            f"{self.seconds:.1f}",
            rate,
            *memory,
            *found,
        )


class Peaks:
    """The most memory that a process and a server had, also those that were killed since."""

    def __init__(self, batcher: Role, server: Server) -> None:
        self.batcher_mib = self.redis_mib = 0.0
        self._batcher = batcher
        self._server = server

    def look(self) -> None:
        """Take the counts of now, while both run."""
        status = Path(f"/proc/{self._batcher.process.pid}/status").read_text()
        high = next(row for row in status.splitlines() if row.startswith("VmHWM"))
        self.batcher_mib = max(self.batcher_mib, int(high.split()[1]) / 1024)
        self.redis_mib = max(self.redis_mib, self._server.ask("INFO", "memory")["used_memory_peak"] / 2**20)


async def run(folder: Path, lines: int, *, kill: bool, workers: int) -> Outcome:
    """One batch. Settings are those of production, but for the fleet's short times."""
    server = Server(server_binary(), folder / "valkey").start()
    shelf = BatchStorage(folder / "store")
    try:
        async with Fleet(folder, server) as fleet:
            flags = {
                "scan_interval_ms": 1_000,
                "step_ms": 2_000,
                "shared_step_ms": 500,
                "chunk_lines": 500,
                "chunk_ms": 30_000,
            }
            batcher = await add_batcher(
                fleet, shelf, max_lines=10**8, storage_max_batch_input_bytes=10**12, **flags
            ).start()
            await fleet.up(workers=workers, slots=64, sim_ttft_ms=0, sim_tokens_per_s=0)
            file_id = shelf.upload(jsonl(line(number, max_tokens=20) for number in range(lines)))
            peaks = Peaks(batcher, server)
            begun = time.monotonic()
            batch_id = shelf.submit(file_id)
            kills = await _kill_all(fleet, shelf, batch_id, batcher, peaks, lines) if kill else 0
            batch = await _watch(shelf, batch_id, peaks, limit_s=120 + lines / 200)
            seconds = time.monotonic() - begun
            peaks.look()
            assert batch.progress.status is BatchStatus.COMPLETED, batch.progress
            output, twice = await asyncio.to_thread(_count, shelf, batch)
            size = (record.bytes if (record := shelf.files.get(ACME, file_id, time.time())) else 0) / 1e6
            return Outcome(
                lines, size, kills, seconds, peaks.batcher_mib, peaks.redis_mib, output, twice, lines - output + twice
            )
    finally:
        server.stop()


async def _kill_all(fleet: Fleet, shelf: BatchStorage, batch_id: str, batcher: Role, peaks: Peaks, lines: int) -> int:
    """SIGKILL: the batcher, a worker, Redis, then all three at once; each started again at once."""
    victims = [[batcher.process], [fleet.workers[0].process], [fleet.server.process]]
    victims.append([process for one in victims for process in one])
    for number, processes in enumerate(victims):
        await shelf.done(batch_id, lines * (number + 1) // 6, limit_s=600)
        peaks.look()
        for process in processes:
            process.kill()
        for process in reversed(processes):
            if process is fleet.server.process:
                await asyncio.to_thread(fleet.server.start)
            else:
                process.start()
    return sum(map(len, victims))


async def _watch(shelf: BatchStorage, batch_id: str, peaks: Peaks, *, limit_s: float) -> Batch:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        await asyncio.sleep(0.2)
        batch = await asyncio.to_thread(shelf.batch, batch_id)
        if batch.ended:
            return batch
    raise AssertionError(f"not ended within {limit_s:g} s: {batch.progress}")


def _count(shelf: BatchStorage, batch: Batch) -> tuple[int, int]:
    """Lines of both files, and how many of them are there a second time."""
    seen: set[str] = set()
    lines = 0
    for custom_id in _ids(shelf, batch):
        lines += 1
        seen.add(custom_id)
    return lines, lines - len(seen)


def _ids(shelf: BatchStorage, batch: Batch) -> Iterator[str]:
    for file_id in (batch.progress.output_file_id, batch.progress.error_file_id):
        record = file_id and shelf.files.get(ACME, file_id, time.time())
        rest = b""
        for piece in shelf.files.read(record) if record else ():
            *whole, rest = (rest + piece).split(b"\n")
            for one in whole:
                yield json.loads(one)["custom_id"]


async def main(sizes: list[int], *, kill: bool, workers: int) -> None:
    """Each size in a fleet of its own, and a table of all."""
    rows = [_HEAD, tuple("---" for _ in _HEAD)]
    with tempfile.TemporaryDirectory(prefix="inferq-batch-") as name:
        for number, lines in enumerate(sizes):
            folder = Path(tempfile.mkdtemp(prefix=f"{number}-", dir=name))
            found = await run(folder, lines, kill=kill, workers=workers)
            rows.append(found.row())
            print(f"| {' | '.join(found.row())} |", flush=True)
            assert (found.output, found.twice, found.missing) == (lines, 0, 0)
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, action="append", help="size of a batch; may be repeated")
    parser.add_argument("--kill", action="store_true", help="SIGKILL batcher, worker and Redis midway")
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    asyncio.run(main(given.lines or [50_000], kill=given.kill, workers=given.workers))
