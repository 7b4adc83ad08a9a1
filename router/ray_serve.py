"""The Router as a Ray Serve deployment: Serve starts, scales, watches and replaces the replicas.

Two ways in. ``replica``: every replica serves clients itself, with the server of the HTTP topology, and those of one
machine share one listening socket (:mod:`router.http.shared_listener`). ``serve``: clients come through Serve's own
proxy (or its HAProxy), to the same app. The first is the default: docs/topologies.md has the figures.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray import serve
from ray.serve.config import AutoscalingContext

from broker import BrokerSettings
from queue_schemas import CannotStart
from storage import StorageSettings
from telemetry import TelemetrySettings, configure_logging, configure_tracing, get_logger, shutdown_tracing
from telemetry.ray_metrics import mirror_metrics
from webhooks.settings import WebhookSettings

from .app import RouterApp, build_router
from .http.shared_listener import SharedListener
from .metrics import OPEN_REQUESTS
from .settings import RouterSettings

WayIn = Literal["replica", "serve"]

DEPLOYMENT = "Router"
_LOOK_BACK_S = 15.0
"""Replicas report every 10 s, Serve's default."""
_MARGIN_S = 10.0
_STUCK_LIMIT_S = 5.0
_LAST_CONNECTIONS_S = 2.0
_FIRST_READY_S = 5.0

log = get_logger("router.ray_serve")


@dataclass(frozen=True, slots=True)
class Scale:
    """How many replicas, and what each may take. ``cpus`` is what Ray reserves for one.

    The number follows the mean of the open requests of the last ``_LOOK_BACK_S`` once it has asked for more, or fewer,
    replicas during the delay.
    """

    min_replicas: int = 2
    max_replicas: int = 8
    target_open_requests: int = 200
    up_delay_s: float = 5.0
    down_delay_s: float = 120.0
    cpus: float = 0.0


class ServingReplica:
    """A replica that listens itself."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        settings: RouterSettings,
        broker: BrokerSettings,
        storage: StorageSettings,
        webhooks: WebhookSettings,
        telemetry: TelemetrySettings,
    ) -> None:
        self._app = _make_app(settings, broker, storage, webhooks, telemetry)
        self._settings = settings
        self._leave = asyncio.Event()
        listening = asyncio.Event()
        self._life = asyncio.create_task(self._serve(listening), name="router")
        self._life.add_done_callback(_tell_why)
        waiting = asyncio.create_task(listening.wait())
        await asyncio.wait((self._life, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._life.done():
            await self._life  # raises why it does not listen

    async def check_health(self) -> None:
        """Asked by Serve now and then, which replaces a replica that raises. Redis's health is not the replica's."""
        if self._life.done():
            raise RuntimeError("the router's server has ended; its log says why")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve asks for, to scale by."""
        return {OPEN_REQUESTS: float(len(self._app.services.requests))}

    async def __del__(self) -> None:
        """Serve's word that this replica is to end, awaited within its graceful shutdown."""
        self._leave.set()
        await asyncio.wait((self._life,))
        shutdown_tracing()

    async def _serve(self, listening: asyncio.Event) -> None:
        shared = SharedListener(_fabric(), self._settings.host, self._settings.port)
        await serve_through(shared, self._app, listening=listening, leave=self._leave)


async def serve_through(
    shared: SharedListener, app: RouterApp, *, listening: asyncio.Event, leave: asyncio.Event
) -> None:
    """Serve ``app`` through ``shared`` until ``leave`` is set, then end without losing a request.

    ``listening`` is set once it serves. Other Routers that share the listener take new connections until this one is
    ready (for ``_FIRST_READY_S`` at most), and again from ``leave`` on; this one serves its open connections until each
    has been told to close. Raises ``CannotStart`` if the address is taken.
    """
    stop_accepting, drained = asyncio.Event(), asyncio.Event()
    async with shared, app.running(), asyncio.TaskGroup() as tasks:
        await app.ready_within(_FIRST_READY_S)
        server = app.listen(
            shared.listener, stop=drained, stop_accepting=stop_accepting, shutdown_timeout_s=_LAST_CONNECTIONS_S
        )
        tasks.create_task(server, name="http")
        log.info("listening", host=shared.host, port=shared.port)
        listening.set()
        await leave.wait()
        shared.close()
        stop_accepting.set()
        await app.leave()
        await app.drain()
        drained.set()


def _tell_why(life: asyncio.Task[None]) -> None:
    if not life.cancelled() and (error := life.exception()) is not None:
        log.critical("router_broken", error=repr(error), exc_info=error)


class ProxiedReplica:
    """A replica that answers what Serve's proxy hands it: ``serve.ingress`` gives it the app."""


def _make_app(
    settings: RouterSettings,
    broker: BrokerSettings,
    storage: StorageSettings,
    webhooks: WebhookSettings,
    telemetry: TelemetrySettings,
) -> RouterApp:
    """The ASGI app of a replica."""
    configure_logging("router", telemetry.log_level, "json")
    configure_tracing("router", telemetry.otlp_endpoint)
    replica = serve.get_replica_context().replica_id.unique_id
    named = settings.model_copy(update={"router_id": f"{settings.router_id}-{replica}"})
    app = build_router(named, broker, storage, webhooks)
    app.add_background(lambda: mirror_metrics(app.services.metrics.registry))
    return app


def application(
    settings: RouterSettings,
    broker: BrokerSettings,
    storage: StorageSettings,
    webhooks: WebhookSettings,
    telemetry: TelemetrySettings,
    *,
    way_in: WayIn = "replica",
    scale: Scale | None = None,
) -> serve.Application:
    """The Serve application of one fabric's Routers. Raises ``CannotStart`` for settings that Serve decides itself."""
    if settings.processes > 1:
        raise CannotStart(
            f"under Ray, Serve runs a Router's processes as replicas: leave {settings.variable('processes')} at 1 and "
            "set min_replicas and max_replicas"
        )
    scale = scale or Scale()

    def make_app() -> RouterApp:
        return _make_app(settings, broker, storage, webhooks, telemetry)

    own = way_in == "replica"
    replica: Any = ServingReplica if own else serve.ingress(make_app)(ProxiedReplica)
    drain_s = (settings.lame_duck_ms + settings.shutdown_timeout_ms) / 1000 + _LAST_CONNECTIONS_S
    autoscaling: dict[str, Any] = {
        "min_replicas": scale.min_replicas,
        "max_replicas": scale.max_replicas,
        "initial_replicas": scale.min_replicas,
        "target_ongoing_requests": scale.target_open_requests,
        "look_back_period_s": _LOOK_BACK_S,
        "upscale_delay_s": scale.up_delay_s,
        "downscale_delay_s": scale.down_delay_s,
    }
    if own:
        autoscaling["policy"] = {"policy_function": replicas_for}
    made = serve.deployment(
        name=DEPLOYMENT,
        max_ongoing_requests=settings.max_concurrent_requests + 1,  # the Router itself says when it has too many
        graceful_shutdown_timeout_s=drain_s + _MARGIN_S,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=2.0,
        health_check_timeout_s=_STUCK_LIMIT_S,
        max_surge_percent=100,  # replacements are there before what they replace goes
        ray_actor_options={"num_cpus": scale.cpus},
        autoscaling_config=autoscaling,
    )(replica)
    return made.bind(settings, broker, storage, webhooks, telemetry) if own else made.bind()


def replicas_for(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Serve's autoscaling policy: by open requests, which Serve does not see where replicas listen themselves."""
    open_requests: Mapping[Any, float] = (context.aggregated_metrics or {}).get(OPEN_REQUESTS, {})
    target: float = context.config.get_target_ongoing_requests()  # type: ignore[union-attr]  # always there
    return max(1, math.ceil(sum(open_requests.values()) / target)), {}


def _fabric() -> str:
    """A short name of this Ray cluster, the same in all its processes."""
    return hashlib.sha256(ray.get_runtime_context().gcs_address.encode()).hexdigest()[:12]
