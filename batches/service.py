"""The batcher's process: ``python -m batches.service``, the same as ``inferq batcher``."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from typing import cast

from fastapi import FastAPI

from broker import Broker, BrokerSettings
from broker.connector import BrokerConnector
from broker.rq.queues import rq_connection
from broker.rq.worker import RqWorkerThread
from storage import ObjectStore, StorageSettings
from telemetry import TelemetrySettings, get_logger
from telemetry.flags import parse_settings
from telemetry.http.app import health_app
from telemetry.http.server import bind_socket, run_beside, run_process, stop_on_signals
from telemetry.reporting import reporting
from telemetry.threads import in_thread

from .context import BatchContext
from .expiry import ExpirySweep
from .metrics import BatchMetrics
from .rq_jobs import StepQueue, step_jobs
from .settings import BatchSettings
from .step_runner import StepRunner
from .step_sweep import StepSweep

_RETRY_LIMIT_MS = 5_000

log = get_logger("batches.service")


async def serve(
    settings: BatchSettings,
    broker_settings: BrokerSettings,
    storage_settings: StorageSettings,
    *,
    stop: asyncio.Event | None = None,
) -> None:
    """Run a batcher until ``stop`` is set, by default until SIGTERM or SIGINT; the running step ends first.

    Raises ``CannotStart`` if the settings cannot work. The file store must be available, Redis need not be.
    """
    if stop is None:
        with stop_on_signals() as signalled:
            await serve(settings, broker_settings, storage_settings, stop=signalled)
        return
    store = ObjectStore.open(storage_settings)
    listener = bind_socket(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    log.info("listening", url=f"http://{host}:{port}")
    context = BatchContext(
        settings, storage_settings.max_batch_input_bytes, store, BatchMetrics(), time.time, time.monotonic
    )
    process = _Process(context)
    await run_beside(process.app(), listener, lambda until: process.run(broker_settings, until), stop)


class _Process:
    """The parts of a batcher: RQ's worker in a thread, the sweeps, the link to the queue."""

    def __init__(self, context: BatchContext) -> None:
        self._context = context
        self._runner: StepRunner | None = None
        self._sweep: StepSweep | None = None
        settings = context.settings
        self._connector = BrokerConnector(
            settings.manager_urls,
            settings.join_token.get_secret_value(),
            variable="INFERQ_BATCHES_MANAGER_URLS",
            on_fault=self._not_connected,
        )

    def app(self) -> FastAPI:
        """Health and metrics."""
        return health_app("inferq batcher", self._context.metrics.registry, self.reasons)

    def reasons(self) -> list[str]:
        """Why the batcher is not ready; empty if it is."""
        if self._context.stopping:
            return ["the batcher is shutting down"]
        found = [f"the queue cannot be reached: {self._connector.fault}"] if self._context.broker is None else []
        found += [self._sweep.fault] if self._sweep is not None and self._sweep.fault else []
        found += [self._runner.fault] if self._runner is not None and self._runner.fault else []
        return found

    async def run(self, broker_settings: BrokerSettings, stop: asyncio.Event) -> None:
        """Until ``stop``."""
        context, settings = self._context, self._context.settings
        await in_thread(context.store.check)
        queue_settings = await self._connector.find(broker_settings, stop)
        if queue_settings is None:
            return
        # A step that cannot reach the queue makes way for others: it is tried again anyway.
        retry_limit_ms = min(queue_settings.retry_limit_ms, _RETRY_LIMIT_MS)
        queue_settings = queue_settings.model_copy(update={"retry_limit_ms": retry_limit_ms})
        steps = StepQueue(rq_connection(queue_settings))
        runner, sweep = self._runner, self._sweep = StepRunner(context, steps), StepSweep(context, steps)
        worker = RqWorkerThread(steps.queue, rq_connection(queue_settings), settings.batcher_id)
        async with asyncio.TaskGroup() as tasks:
            step_jobs.serve(runner.advance)
            link = tasks.create_task(self._connector.run(queue_settings, context.metrics.registry, self._connected))
            sweeps = [tasks.create_task(sweep.run()), tasks.create_task(ExpirySweep(context).run())]

            def on_stop() -> None:
                context.stopping = True
                for task in sweeps:
                    task.cancel()

            try:
                await worker.run(stop, on_stop=on_stop, limit_s=settings.shutdown_timeout_ms / 1000)
            finally:
                step_jobs.serve(None)
                for task in (link, *sweeps):
                    task.cancel()

    def _connected(self, broker: Broker) -> None:
        self._context.broker = broker

    def _not_connected(self, why: str) -> None:
        self._context.why = why


def main(argv: Sequence[str] | None = None) -> int:
    """Read flags, environment and ``inferq.toml``, run a batcher, answer the exit code."""

    async def run() -> None:
        tables = (BatchSettings, BrokerSettings, StorageSettings, TelemetrySettings)
        own, queue, store, telemetry = parse_settings("inferq batcher", "Runs batches.", argv, *tables)
        with reporting("batcher", cast(TelemetrySettings, telemetry)):
            await serve(cast(BatchSettings, own), cast(BrokerSettings, queue), cast(StorageSettings, store))

    return run_process(run)


if __name__ == "__main__":
    sys.exit(main())
