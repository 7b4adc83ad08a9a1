"""Run a worker process: its engine, its HTTP service, and one session after the other.

``python -m worker.service --worker-id worker-1 --manager-url http://localhost:18000 --port 7000 --model MODEL``
"""

from __future__ import annotations

import asyncio
import shlex
import socket
import sys
from collections.abc import Callable, Sequence
from math import nan
from pathlib import Path
from typing import cast

from broker import Broker, BrokerSettings
from broker.embedded.local_password import complete_url
from queue_schemas import (
    BrokerFull,
    BrokerUnavailable,
    EngineState,
    Fenced,
    RegistrationAnswer,
    new_session_id,
)
from queue_schemas.addresses import is_loopback
from scheduling.slots import EngineLoad
from telemetry import (
    MetricsRegistry,
    TelemetrySettings,
    get_logger,
)
from telemetry.backoff import Backoff
from telemetry.flags import parse_settings
from telemetry.http.loopback_access import LoopbackAccess
from telemetry.http.server import bind_socket, refuse_unguarded, run_process, run_server, stop_on_signals
from telemetry.redaction import redact_url
from telemetry.reporting import reporting

from .context import WorkerContext
from .engines import Engine
from .engines.adapter_folder import AdapterFolder
from .engines.choice import make_engine
from .engines.process import ProcessEngine
from .metrics import WorkerMetrics
from .over_http.manager_client import HttpManagerClient
from .over_http.queue import HttpQueue
from .queue import Queue
from .registration.addresses import Addresses
from .registration.manager_client import ManagerClient
from .routes import Status, make_app
from .session import WorkerSession
from .settings import WorkerSettings

_BACKOFF = Backoff(0.2, 5.0)
_SIM_FLAG = "--sim-"

log = get_logger("worker.service")


class Worker:
    """One worker process. ``run`` ends when ``drain`` is set and everything has been handed over.

    ``listener`` is the socket of its HTTP service. The engine is the one of the settings unless given.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        listener: socket.socket,
        engine: Engine | None = None,
        *,
        hurry: asyncio.Event | None = None,
    ) -> None:
        """``hurry``: set it to hand running jobs over at once when the worker drains."""
        self.settings = settings
        self.registry = MetricsRegistry("worker")
        self.drain = asyncio.Event()
        self.hurry = hurry or asyncio.Event()
        self._metrics = WorkerMetrics(self.registry)
        self._listener = listener
        self._engine = engine or make_engine(settings, self._metrics.engine_restarts.inc)
        self._addresses = Addresses.of(settings)
        make_client = HttpManagerClient if settings.over_http else ManagerClient
        self._client = make_client(self._addresses)
        self._queue: Queue | None = None
        self._context = WorkerContext(
            settings=settings,
            engine=self._engine,
            client=self._client,
            metrics=self._metrics,
            url=_advertised(settings, listener),
            connect=self._connect,
            drain=self.drain,
            hurry=self.hurry,
            switching=self._engine if isinstance(self._engine, ProcessEngine) and self._engine.loadable else None,
            adapters=_adapters(settings),
        )
        self._session = WorkerSession(self._context, new_session_id(settings.name))
        self._watch()

    async def run(self) -> None:
        """Serve until drained. Raises ``WorkerIdTaken`` and other errors that say what its user can change."""
        stop_http = asyncio.Event()
        settings = self.settings
        local = LoopbackAccess.of(settings.host, insecure=settings.insecure)
        app = make_app(self.status, self.drain.set, self.registry, settings.join_token.get_secret_value(), local)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(
                    run_server(app, sock=self._listener, stop=stop_http, shutdown_timeout_s=1.0), name="http"
                )
                engine = group.create_task(self._engine.run(self._engine_changed), name="engine")
                await self._run_sessions()
                engine.cancel()
                stop_http.set()
        finally:
            await self._engine.stop(self.settings.engine_stop_timeout_ms / 1000)
            await self._client.close()
            if self._queue is not None:
                await self._queue.close()
        log.info("worker_ended")

    def status(self) -> Status:
        """The page ``GET /status``."""
        session, now = self._session, self._session.status()
        reasons = session.problems
        return Status(
            worker_id=self.settings.name,
            session_id=session.session_id,
            ready=not reasons,
            reasons=reasons,
            draining=now.draining,
            engine=now.engine,
            engine_detail=now.engine_detail,
            models=now.models,
            slots=now.slots,
            running=now.running,
            broker_ok=now.broker_ok,
            manager_url=redact_url(self._client.url),
            assignment=session.slots.order,
        )

    def _engine_changed(self) -> None:
        self._session.engine_changed()

    async def _run_sessions(self) -> None:
        """One session after the other, until one drains."""
        first = True
        while True:
            try:
                await self._session.run(first=first)
            except BaseExceptionGroup as failures:
                fenced, others = failures.split(Fenced)
                if fenced is None or others is not None:
                    raise
            else:
                return
            self._metrics.fenced.inc()
            log.warning("session_fenced", session_id=self._session.session_id, abandoned=self._session.slots.busy)
            if self.drain.is_set():
                return
            first = False
            self._session = WorkerSession(self._context, new_session_id(self.settings.name))

    async def _connect(self, answer: RegistrationAnswer) -> Queue:
        """The queue, opened at the first call; waits for a Redis that is away or full."""
        if self._queue is None:
            queue = self._queue = await self._open(answer)
            self.registry.watch_round_trips(lambda: queue.round_trips)
        return self._queue

    async def _open(self, answer: RegistrationAnswer) -> Queue:
        if self.settings.over_http:
            return HttpQueue(self._addresses, answer.shards)

        async def connect() -> Broker:
            url = await complete_url(self.settings.redis_url or answer.broker_url)
            return await Broker.connect(BrokerSettings.load(redis_url=url, shards=answer.shards))

        return await _BACKOFF.retry(
            connect,
            when=lambda error: isinstance(error, BrokerUnavailable | BrokerFull),
            failed=lambda error, pause_s: log.warning("queue_unreachable", error=str(error), again_in_s=pause_s),
        )

    @property
    def _load(self) -> EngineLoad | None:
        return self._session.load_monitor.load

    def _watch(self) -> None:
        slots = self.registry.gauge("inferq_slots", "Jobs that can run at once, and that do", ("state",))
        slots.labels("total").set_function(lambda: self._session.slots.total)
        slots.labels("busy").set_function(lambda: self._session.slots.busy)
        requests = self.registry.gauge(
            "inferq_engine_requests",
            "Requests in the engine, by its own metrics; NaN: it tells none",
            ("state",),
        )
        requests.labels("running").set_function(lambda: _figure(self._load, lambda load: load.running))
        requests.labels("waiting").set_function(lambda: _figure(self._load, lambda load: load.waiting))
        kv_usage = self.registry.gauge("inferq_engine_kv_usage_ratio", "Share of the engine's KV cache in use, 0 to 1")
        kv_usage.set_function(lambda: _figure(self._load, lambda load: load.kv_usage))
        preemptions = self.registry.gauge(
            "inferq_engine_preemptions", "Requests that the engine preempted since it started"
        )
        preemptions.set_function(lambda: _figure(self._load, lambda load: load.preemptions))
        ready = self.registry.gauge("inferq_engine_ready", "1 while the engine takes calls")
        ready.set_function(lambda: self._engine.state is EngineState.READY)
        failures = self.registry.gauge(
            "inferq_engine_failures_in_a_row", "Failures of the engine without a while of being well between"
        )
        failures.set_function(lambda: self._engine.failures)


def _figure(load: EngineLoad | None, figure: Callable[[EngineLoad], float | None]) -> float:
    value = None if load is None else figure(load)
    return nan if value is None else value


def _adapters(settings: WorkerSettings) -> AdapterFolder | None:
    if not settings.adapters_dir:
        return None
    return AdapterFolder(Path(settings.adapters_dir), settings.max_adapters, taken=settings.own_models)


def _advertised(settings: WorkerSettings, listener: socket.socket) -> str | None:
    if settings.advertise_url:
        return settings.advertise_url
    port = listener.getsockname()[1]
    host = settings.host
    if host in ("0.0.0.0", "::", ""):  # noqa: S104 - compared, not bound
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def run_worker(settings: WorkerSettings) -> None:
    """Run one worker until SIGTERM or SIGINT (it drains; a second one hands over what
    runs, a third ends it at once) or until it is told to drain."""
    refuse_unguarded(
        settings.host,
        guarded=bool(settings.join_token.get_secret_value()),
        insecure=settings.insecure,
        remedy="set a join token (INFERQ_JOIN_TOKEN)",
    )
    with bind_socket(settings.host, settings.port) as listener, stop_on_signals(hurry := asyncio.Event()) as stop:
        worker = Worker(settings, listener, hurry=hurry)
        log.info(
            "worker_starting",
            worker_id=settings.name,
            port=listener.getsockname()[1],
            engine=settings.engine_kind,
            managers=settings.manager_urls,
            public=not is_loopback(settings.host),
        )
        async with asyncio.TaskGroup() as group:
            signals = group.create_task(_drain_on(stop, worker.drain), name="signals")
            await worker.run()
            signals.cancel()


async def _drain_on(stop: asyncio.Event, drain: asyncio.Event) -> None:
    await stop.wait()
    drain.set()


def read_settings(argv: Sequence[str] | None = None) -> tuple[WorkerSettings, TelemetrySettings]:
    """The settings of a command line: a flag per setting, and ``--sim-...``.

    Raises ``CannotStart`` for a wrong value; ends the process for a flag that does not exist.
    """
    own, telemetry = parse_settings(
        "inferq worker", "A worker of an inferq fabric.", _gather_sim_flags(argv), WorkerSettings, TelemetrySettings
    )
    return cast(WorkerSettings, own), cast(TelemetrySettings, telemetry)


def _gather_sim_flags(argv: Sequence[str] | None) -> list[str]:
    """``--sim-ttft-ms 5`` as part of the setting ``sim_args``."""
    rest: list[str] = []
    sim: list[str] = []
    target = rest
    for part in sys.argv[1:] if argv is None else argv:
        if part.startswith("--"):
            of_sim = part.startswith(_SIM_FLAG) and not part.startswith("--sim-args")
            target = sim if of_sim else rest
            part = f"--{part.removeprefix(_SIM_FLAG)}" if of_sim else part  # noqa: PLW2901
        target.append(part)
    return [*rest, f"--sim-args={shlex.join(sim)}"] if sim else rest


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker; the process's exit code."""

    async def run() -> None:
        settings, telemetry = read_settings(argv)
        with reporting("worker", telemetry):
            await run_worker(settings)

    return run_process(run)


if __name__ == "__main__":
    sys.exit(main())
