"""A batcher without a process: its steps one by one, on a clock that a test sets, over fakeredis and a folder.

Engines are a function of the test's: what it answers to a body.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import fakeredis

from batches import BatchSettings
from batches.context import BatchContext
from batches.metrics import BatchMetrics
from batches.rq_jobs import StepQueue
from batches.step_runner import StepRunner
from batches.step_sweep import StepSweep
from broker import Broker
from queue_schemas import END, HEAD, Frame, Lease, Outcome, Pool, Tenant
from storage import Batch
from tests.support.batches import ACME, BatchStorage
from tests.support.queue import Puller

Engine = Callable[[dict[str, Any]], tuple[int, Any]]
"""Status and answer to a line's body."""


def echo(body: dict[str, Any]) -> tuple[int, Any]:
    """Says what it was asked."""
    return 200, {"said": body["messages"][0]["content"], "usage": {"prompt_tokens": 2, "completion_tokens": 3}}


class Scene:
    """One batcher, and an engine that runs when it is told to. ``now`` is the wall clock."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.shelf = BatchStorage(folder)
        self.server = fakeredis.FakeServer()
        self.now = 2_000_000_000.0
        usual: dict[str, Any] = {"step_ms": 10, "shared_step_ms": 10, "retry_backoff_ms": 10, "cancel_grace_ms": 0}
        self.settings = BatchSettings.load(**(usual | dict(settings)))
        self.broker = Broker.over(self.client(), retry_limit_ms=200)
        self.worker = Puller(self.broker)
        self.batcher, self.context, self.steps = self.another()
        self.sweep = StepSweep(self.context, self.steps)

    def client(self) -> fakeredis.FakeAsyncRedis:
        return fakeredis.FakeAsyncRedis(server=self.server, protocol=2)

    def another(self) -> tuple[StepRunner, BatchContext, StepQueue]:
        """Another batcher, over the same store and queue."""
        import time  # noqa: PLC0415 - beside ``now``

        context = BatchContext(
            self.settings,
            10**9,
            self.shelf.store,
            BatchMetrics(),
            lambda: self.now,
            time.monotonic,
            broker=self.broker,
        )
        steps = StepQueue(fakeredis.FakeRedis(server=self.server, protocol=2))
        return StepRunner(context, steps), context, steps

    async def serve(self, model: str = "sim") -> None:
        """A worker joins."""
        await self.worker.join()
        await self.broker.known_pools.remember([model])

    def submit(self, lines: Iterable[Mapping[str, Any]], tenant: Tenant = ACME, **fields: Any) -> str:
        """A batch over these lines."""
        return self.shelf.run(lines, tenant, **({"now_s": self.now} | fields))

    async def step(self, batch_id: str, tenant: Tenant = ACME) -> Batch:
        """One step of it, at once; the batch after it."""
        self.steps.forget([batch_id], "pause")
        self.steps.queue.empty()
        await self.batcher.advance(tenant, batch_id)
        return self.shelf.batch(batch_id, tenant)

    async def run_jobs(self, engine: Engine = echo, most: int = 10_000) -> int:
        """The worker runs what waits on the queue."""
        ran = 0
        while ran < most:
            leases = await self.worker.claim(min(64, most - ran), models=["sim"])
            for lease in leases:
                await self.answer(lease, engine)
            ran += len(leases)
            if not leases:
                break
        return ran

    async def answer(self, lease: Lease, engine: Engine = echo) -> None:
        """The worker answers one job."""
        status, answer = engine(json.loads(lease.job.body))
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        frame = Frame(lease.job.id, lease.epoch, lease.attempt_id, 0, HEAD | END, data, status, "application/json")
        await self.broker.attempts.settle(lease, Outcome.DONE if status < 400 else Outcome.FAILED, frame.pack())

    async def until(
        self, batch_id: str, far: Callable[[Batch], bool], tenant: Tenant = ACME, **engine: Engine
    ) -> Batch:
        """Steps and answers in turn, until the batch is as far as that."""
        for _ in range(300):
            batch = await self.step(batch_id, tenant)
            if far(batch):
                return batch
            await self.run_jobs(**engine)
        raise AssertionError(f"not so far after 300 steps: {batch.progress}")

    async def end(self, batch_id: str, tenant: Tenant = ACME, **engine: Engine) -> Batch:
        """The batch, once it has ended."""
        return await self.until(batch_id, lambda batch: batch.ended, tenant, **engine)

    def output(self, batch: Batch) -> dict[str, Any]:
        """The output file's lines by custom_id, each there once."""
        return self._by_id(batch.progress.output_file_id, Tenant(batch.request.tenant))

    def errors(self, batch: Batch) -> dict[str, Any]:
        """The error file's lines by custom_id, each there once."""
        return self._by_id(batch.progress.error_file_id, Tenant(batch.request.tenant))

    def _by_id(self, file_id: str | None, tenant: Tenant) -> dict[str, Any]:
        lines = self.shelf.lines(file_id, tenant, now_s=self.now)
        found = {one["custom_id"]: one for one in lines}
        assert len(found) == len(lines), "a custom_id stands twice"
        return found


OpenScene = Callable[..., Awaitable[Scene]]


@asynccontextmanager
async def opened(folder: Path, **settings: Any) -> AsyncIterator[Scene]:
    """A scene with a worker for the model ``sim``."""
    scene = Scene(folder, settings)
    await scene.serve()
    yield scene
    await scene.broker.close()


__all__ = ["ACME", "Pool", "Scene", "echo", "opened"]
