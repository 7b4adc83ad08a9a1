"""How many Redis commands a job costs, and bytes on the wire: no call runs or sends more than
``tests/golden/command_counts.json`` records.

A change that costs more must raise the figure there; one that costs less lowers it, and keeps what it won.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

from broker import Broker
from queue_schemas import HEAD, Frame, Job, Lease, Outcome
from tests.support.queue import Puller, ServerBackend, answer_frame, make_job

from .conftest import Listener

RECORDED: dict[str, int] = json.loads((Path(__file__).parents[1] / "golden" / "command_counts.json").read_text())
T = TypeVar("T")
BATCH = 64
STEP_BYTES = 200
UNCOUNTED = {"get", "set", "time", "info", "ping", "hello", "command", "client", "script", "evalsha", "eval"}
"""The queue's clock is written by time, not by call; the rest is the caller's and the test's own."""


class _Counter:
    """Counts what the server ran, inside of scripts too."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.counts: dict[str, int] = {}

    async def _total(self) -> int:
        stats = await self._client.info("commandstats")
        names = {name: name.removeprefix("cmdstat_").split("|")[0] for name in stats}
        return sum(stats[name]["calls"] for name, command in names.items() if command not in UNCOUNTED)

    async def _bytes(self) -> int:
        stats = await self._client.info("stats")
        return int(stats["total_net_input_bytes"]) + int(stats["total_net_output_bytes"])

    async def of(self, name: str, calls: Awaitable[T]) -> T:
        """The answer of ``calls``, whose commands are noted under ``name``, and their bytes, in steps of ``STEP_BYTES``
        for the digits that differ from run to run. A look at the figures costs bytes itself: they are counted once."""
        before = await self._total()
        look = await self._bytes()
        idle = await self._bytes() - look
        bytes_before = await self._bytes()
        answer = await calls
        size = await self._bytes() - bytes_before - idle
        self.counts[name] = await self._total() - before
        self.counts[f"{name}: bytes"] = size // STEP_BYTES * STEP_BYTES
        return answer


def _token(lease: Lease) -> bytes:
    return Frame(lease.job.id, lease.epoch, lease.attempt_id, 0, HEAD, b"token", 200, "text/event-stream").pack()


async def _replay(broker: Broker, counter: _Counter, worker: Puller, router: str, number: int) -> None:
    """Jobs from their start to their end, ``number`` in each call."""

    async def enqueue(jobs: list[Job]) -> None:
        await asyncio.gather(*map(broker.jobs.enqueue, jobs))

    async def settle(leases: list[Lease], seq: int) -> None:
        answers = (
            broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease, seq=seq), used=700, run_ms=1_500)
            for lease in leases
        )
        await asyncio.gather(*answers)

    async def append(leases: list[Lease]) -> None:
        await asyncio.gather(*(broker.attempts.append(lease, _token(lease)) for lease in leases))

    await counter.of(f"enqueue {number}", enqueue([make_job(reply_to=router) for _ in range(number)]))
    leases = await counter.of(f"claim {number}", worker.claim(number))
    await counter.of(f"settle {number}", settle(leases, 0))
    kept = [make_job(persisted=True, stream=True) for _ in range(number)]
    await asyncio.gather(*(broker.jobs.enqueue_persisted(job, listener=router) for job in kept))
    leases = await worker.claim(number)
    assert len(leases) == number
    await counter.of(f"append {number}", append(leases))
    await counter.of(f"end persisted {number}", settle(leases, 1))


async def test_no_call_runs_more_commands_than_recorded(real_backend: ServerBackend) -> None:
    """For a lone job, and for many in one call."""
    broker, client = await real_backend.connect(), real_backend.client()
    try:
        listener, worker, counter = await Listener(client).open(), await Puller(broker).join(), _Counter(client)
        for number in (1, 1, BATCH):  # the first brings the scripts
            await _replay(broker, counter, worker, listener.router, number)
        models = [f"model-{number}" for number in range(BATCH)]
        for _ in range(2):
            await counter.of(f"park for {BATCH} models", worker.claim(1, models, offer=1))
    finally:
        await broker.close()
        await client.aclose()
    assert counter.counts.keys() == RECORDED.keys()
    assert {name: count for name, count in counter.counts.items() if count > RECORDED[name]} == {}
