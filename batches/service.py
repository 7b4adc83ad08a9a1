"""The batcher's process: ``python -m batches.service``, the same as ``inferq batcher``."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import cast

import aiohttp
from fastapi import FastAPI
from pydantic import ValidationError

from broker import Broker, BrokerSettings
from broker.link import open_link
from queue_schemas import (
    FABRIC_PREFIX,
    JOIN_TOKEN_HEADER,
    BrokerAddress,
    BrokerUnsuitable,
    CannotStart,
    InferqError,
    ManagerUnavailable,
)
from storage import ObjectStore, StorageSettings
from telemetry import TelemetrySettings, configure_logging, configure_tracing, get_logger, shutdown_tracing
from telemetry.asgi import health_routes, prepare_app
from telemetry.flags import parse_settings
from telemetry.server import bind_socket, run_process, run_server, stop_on_signals

from .batcher import Batcher
from .desk import Desk
from .metrics import BatchMetrics
from .rq_queue import StepQueue, rq_connection
from .rq_worker import run_rq_worker
from .settings import BatchSettings
from .steps import serve_steps
from .sweep import Sweep

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_ASK_LIMIT_S = 10.0

log = get_logger("batches.service")


async def serve(
    settings: BatchSettings,
    broker_settings: BrokerSettings,
    storage_settings: StorageSettings,
    *,
    stop: asyncio.Event | None = None,
) -> None:
    """Run a batcher until ``stop`` is set, or without it until SIGTERM or SIGINT; the step that runs then ends first.

    Raises ``CannotStart`` if the settings cannot work. Redis need not be there; the store must.
    """
    if stop is None:
        with stop_on_signals() as signalled:
            await serve(settings, broker_settings, storage_settings, stop=signalled)
        return
    store = ObjectStore.open(storage_settings)
    listener = bind_socket(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    log.info("batcher_listens", url=f"http://{host}:{port}")
    desk = Desk(settings, store, BatchMetrics(), time.time, time.monotonic)
    process = _Process(desk)
    served = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        http = tasks.create_task(run_server(process.app(), sock=listener, stop=served, shutdown_limit_s=1.0))
        stopping = tasks.create_task(stop.wait())
        working = tasks.create_task(process.run(broker_settings, stop))
        await asyncio.wait((http, stopping, working), return_when=asyncio.FIRST_COMPLETED)
        stop.set()
        await working
        served.set()


class _Process:
    """What runs in it: RQ's worker in a thread, the sweep, the link to the queue."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._batcher: Batcher | None = None
        self._sweep: Sweep | None = None

    def app(self) -> FastAPI:
        """Health and metrics."""
        app = FastAPI(title="inferq batcher", docs_url=None, redoc_url=None)
        prepare_app(app, self._desk.metrics.registry)
        app.include_router(health_routes(self._desk.metrics.registry, self.reasons))
        return app

    def reasons(self) -> list[str]:
        """Why no batch goes on."""
        if self._desk.stopping:
            return ["the batcher is shutting down"]
        found = [f"the queue cannot be reached: {self._desk.why}"] if self._desk.broker is None else []
        found += [self._sweep.fault] if self._sweep is not None and self._sweep.fault else []
        found += [self._batcher.stalled] if self._batcher is not None and self._batcher.stalled else []
        return found

    async def run(self, broker_settings: BrokerSettings, stop: asyncio.Event) -> None:
        """Until ``stop``."""
        settings = self._desk.settings
        await asyncio.to_thread(self._desk.store.check)
        queue = await self._address(broker_settings, stop)
        if queue is None:
            return
        steps = StepQueue(rq_connection(settings.rq_redis_url, queue))
        self._batcher, self._sweep = Batcher(self._desk, steps), Sweep(self._desk, steps)
        serve_steps(self._batcher)
        ended, ending = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def work() -> None:
            try:
                run_rq_worker(steps.queue, rq_connection(settings.rq_redis_url, queue), settings.batcher_id, ending)
            except Exception:
                log.exception("rq_worker_ended")
            finally:
                with suppress(RuntimeError):  # the loop is gone: nobody waits
                    loop.call_soon_threadsafe(ended.set)

        async with asyncio.TaskGroup() as tasks:
            linked = tasks.create_task(self._keep_link(queue), name="link")
            sweeping = tasks.create_task(self._sweep.run(), name="sweep")
            # A daemon: a thread that hangs in a call must not keep the process from ending.
            threading.Thread(target=work, name="rq worker", daemon=True).start()
            stopped = tasks.create_task(stop.wait())
            died = tasks.create_task(ended.wait())
            await asyncio.wait((stopped, died), return_when=asyncio.FIRST_COMPLETED)
            self._desk.stopping = True
            ending.set()
            sweeping.cancel()
            try:
                async with asyncio.timeout(settings.shutdown_limit_ms / 1000):
                    await ended.wait()
            except TimeoutError:
                log.warning("step_cut_short", limit_ms=settings.shutdown_limit_ms)
            serve_steps(None)
            for task in (linked, stopped, died):
                task.cancel()
        if not stop.is_set():
            raise CannotStart("RQ's worker ended; the log says why")

    async def _keep_link(self, queue: BrokerSettings) -> None:
        """Connect to the queue, once it can be; then stay so until cancelled."""
        pause = _FIRST_PAUSE_S
        while self._desk.broker is None:
            try:
                self._desk.broker = await Broker.connect(queue)
            except BrokerUnsuitable:
                raise
            except InferqError as error:
                if error.message != self._desk.why:
                    log.warning("queue_not_connected", error=error.message)
                self._desk.why = error.message
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE_S)
        broker = self._desk.broker
        self._desk.metrics.registry.watch_round_trips(lambda: broker.round_trips)
        log.info("queue_connected")
        try:
            await asyncio.Event().wait()
        finally:
            await broker.close()

    async def _address(self, given: BrokerSettings, stop: asyncio.Event) -> BrokerSettings | None:
        """Where the queue is: as the settings say, or a Manager, which is asked until it answers or we are to stop."""
        if not given.redis_url:
            url = self._desk.settings.manager_url
            if not url:
                raise CannotStart(
                    "say where the queue is: --redis-url (INFERQ_REDIS_URL), or --manager-url "
                    "(INFERQ_BATCHES_MANAGER_URL) to ask the Manager"
                )
            pause = _FIRST_PAUSE_S
            while not stop.is_set():
                try:
                    address = await _ask_manager(url, self._desk.settings.join_token.get_secret_value())
                except ManagerUnavailable as error:
                    self._desk.why = error.message
                    with suppress(TimeoutError):
                        async with asyncio.timeout(pause):
                            await stop.wait()
                    pause = min(pause * 2, _LONGEST_PAUSE_S)
                else:
                    given = given.model_copy(update={"redis_url": address.broker_url, "shards": address.shards})
                    break
            else:
                return None
        open_link(given)  # connects to nothing: it only reads the URL
        return given


async def _ask_manager(url: str, token: str) -> BrokerAddress:
    """Raises ``ManagerUnavailable``, or ``CannotStart`` if it will not have us."""
    where = f"{url.rstrip('/')}{FABRIC_PREFIX}/broker"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ASK_LIMIT_S)) as session,
            session.get(where, headers={JOIN_TOKEN_HEADER: token} if token else {}) as answer,
        ):
            if answer.status in (401, 403):
                raise CannotStart(f"the Manager at {url} refuses our join token: set INFERQ_JOIN_TOKEN to the fleet's")
            if answer.status != 200:
                raise ManagerUnavailable(f"the Manager at {url} does not say where Redis is ({answer.status})")
            return BrokerAddress.model_validate_json(await answer.read())
    except (aiohttp.ClientError, TimeoutError, OSError, ValidationError) as error:
        raise ManagerUnavailable(f"the Manager at {url} cannot be asked ({type(error).__name__}: {error})") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Read flags, environment and ``inferq.toml``, run a batcher, answer the exit code."""

    async def run() -> None:
        tables = (BatchSettings, BrokerSettings, StorageSettings, TelemetrySettings)
        own, queue, store, reporting = parse_settings("inferq batcher", "Runs batches.", argv, *tables)
        telemetry = cast(TelemetrySettings, reporting)
        configure_logging("batcher", telemetry.log_level, telemetry.log_format)
        configure_tracing("batcher", telemetry.otlp_endpoint)
        try:
            await serve(cast(BatchSettings, own), cast(BrokerSettings, queue), cast(StorageSettings, store))
        finally:
            shutdown_tracing()

    return run_process(run)


if __name__ == "__main__":
    sys.exit(main())
