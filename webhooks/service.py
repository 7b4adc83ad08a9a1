"""The notifier's process: ``python -m webhooks.service``, the same as ``inferq notifier``."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import cast

from fastapi import FastAPI

from broker import Broker, BrokerSettings
from broker.connector import BrokerConnector
from broker.rq.queues import rq_connection
from broker.rq.worker import RqWorkerThread
from queue_schemas import InferqError
from storage import ObjectStore, StorageSettings
from telemetry import (
    MetricsRegistry,
    TelemetrySettings,
    get_logger,
)
from telemetry.flags import parse_settings
from telemetry.http.app import health_app
from telemetry.http.server import bind_socket, run_beside, run_process, stop_on_signals
from telemetry.reporting import reporting
from telemetry.threads import in_thread

from .claims import CLAIM_MARGIN_MS
from .dispatcher import Dispatcher
from .job_notices import ResponseNotices
from .metrics import NotifierMetrics
from .rq_jobs import JOB_S, DeliveryJobs, DeliveryQueue, delivery_jobs
from .sender import Sender
from .settings import NotifierSettings, WebhookSettings

log = get_logger("webhooks.service")


async def serve(
    settings: NotifierSettings,
    broker_settings: BrokerSettings,
    storage_settings: StorageSettings,
    webhook_settings: WebhookSettings,
    *,
    stop: asyncio.Event | None = None,
) -> None:
    """Run a notifier until ``stop`` is set, by default until SIGTERM or SIGINT; running attempts finish first.

    Raises ``CannotStart`` if the settings cannot work. The file store must be available, Redis need not be.
    """
    if stop is None:
        with stop_on_signals() as signalled:
            await serve(settings, broker_settings, storage_settings, webhook_settings, stop=signalled)
        return
    process = _Process(settings, ObjectStore.open(storage_settings), webhook_settings)
    listener = bind_socket(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    log.info("listening", url=f"http://{host}:{port}")
    await run_beside(process.app(), listener, lambda until: process.run(broker_settings, until), stop)


class _Process:
    """The parts of a notifier: RQ's worker in a thread, the dispatcher, the scan, the link to the queue."""

    def __init__(self, settings: NotifierSettings, store: ObjectStore, webhooks: WebhookSettings) -> None:
        self._settings = settings
        self._store = store
        self._registry = MetricsRegistry("notifier")
        metrics = NotifierMetrics(self._registry)
        self._dispatcher = Dispatcher(
            store, Sender(webhooks.rules, settings.attempt_timeout_ms / 1000), settings, metrics
        )
        self._notices = ResponseNotices(store, metrics)
        self._jobs: DeliveryJobs | None = None
        self._connector = BrokerConnector(
            settings.manager_urls, settings.join_token.get_secret_value(), variable="INFERQ_NOTIFIER_MANAGER_URLS"
        )
        self._stopping = False

    def app(self) -> FastAPI:
        """Health and metrics."""
        return health_app("inferq notifier", self._registry, self.reasons)

    def reasons(self) -> list[str]:
        """Why the notifier is not ready; empty if it is."""
        if self._stopping:
            return ["the notifier is shutting down"]
        found = [f"the queue cannot be reached: {self._connector.fault}"] if self._connector.broker is None else []
        found += [self._jobs.fault] if self._jobs is not None and self._jobs.fault else []
        return found + ([self._notices.fault] if self._notices.fault else [])

    async def run(self, broker_settings: BrokerSettings, stop: asyncio.Event) -> None:
        """Until ``stop``."""
        settings, every_s = self._settings, self._settings.scan_interval_ms / 1000
        await in_thread(self._store.check)
        queue_settings = await self._connector.find(broker_settings, stop)
        if queue_settings is None:
            return
        queue = DeliveryQueue(rq_connection(queue_settings), settings.lock_ttl_ms)
        jobs = self._jobs = DeliveryJobs(self._dispatcher, queue)
        worker = RqWorkerThread(queue.queue, rq_connection(queue_settings), settings.notifier_id)
        async with self._dispatcher.running(), asyncio.TaskGroup() as tasks:
            delivery_jobs.serve(jobs.run)
            background = [
                tasks.create_task(self._connector.run(queue_settings, self._registry, _connected), name="link"),
                tasks.create_task(jobs.scan(every_s), name="scan"),
                tasks.create_task(self._notices.run(lambda: self._connector.broker, every_s), name="response notices"),
                tasks.create_task(self._tidy(settings.tidy_interval_ms / 1000), name="tidy"),
            ]
            try:
                await worker.run(stop, on_stop=self._stop, limit_s=JOB_S + CLAIM_MARGIN_MS / 1000)
            finally:
                delivery_jobs.serve(None)
                for task in background:
                    task.cancel()

    def _stop(self) -> None:
        self._stopping = True
        self._dispatcher.stop()

    async def _tidy(self, every_s: float) -> None:
        """Tidy now and then, until cancelled. Several notifiers may do so at once."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self._dispatcher.tidy()
            except InferqError as error:
                log.warning("webhooks_not_tidied", error=error.message, retry_in_s=every_s)


def _connected(_: Broker) -> None:
    """The link holds the broker, and no other part needs it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Read flags, environment and ``inferq.toml``, run a notifier, answer the exit code."""

    async def run() -> None:
        tables = (NotifierSettings, WebhookSettings, BrokerSettings, StorageSettings, TelemetrySettings)
        own, webhooks, queue, store, telemetry = parse_settings("inferq notifier", "Sends webhooks.", argv, *tables)
        with reporting("notifier", cast(TelemetrySettings, telemetry)):
            await serve(
                cast(NotifierSettings, own),
                cast(BrokerSettings, queue),
                cast(StorageSettings, store),
                cast(WebhookSettings, webhooks),
            )

    return run_process(run)


if __name__ == "__main__":
    sys.exit(main())
