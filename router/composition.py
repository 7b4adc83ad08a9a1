"""Builds the services of one Router, each once, and hands every feature's pages only what they use.

:func:`build_services` makes the long-lived objects, :func:`build_pages` the FastAPI app on top of them. Only
:mod:`router.app` and tests see :class:`RouterServices`; no feature does.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from importlib.metadata import version

from fastapi import FastAPI

from broker import Broker, BrokerSettings
from broker.embedded.local_password import complete_url
from broker.redis.link import open_link
from queue_schemas import BrokerUnsuitable, CannotStart
from queue_schemas.fleet.acting_manager import RAY_SCHEME
from storage import ObjectStore, StorageSettings
from telemetry.http.asgi import health_routes, prepare_app
from telemetry.http.fabric_calls import FabricHttp
from webhooks.settings import WebhookSettings

from .batches.routes import batch_routes
from .files.routes import FILES_PATH, file_routes
from .files.transfers import StorageQuota, Transfers
from .fleet.engine_routes import engine_routes
from .fleet.manager_client import HttpManager, RemoteManager
from .fleet.manager_failover import ManagerRoute
from .fleet.ray_manager import RayManager
from .fleet.routes import dead_letter_routes, manager_routes, model_routes, pool_routes
from .http.access import Gate, local_callers
from .http.api_keys import ApiKeys
from .inference.cancellation import Canceller
from .inference.followers import Followers
from .inference.job_builder import JobBuilder
from .inference.open_requests import OpenRequests
from .inference.relay import Relay
from .inference.routes import Inference
from .jobs.disconnect_grace import DisconnectGrace
from .jobs.output_streamer import OutputStreamer
from .jobs.persisted_requests import PersistedRequests
from .jobs.routes import job_routes
from .jobs.service import PersistedJobs
from .lifecycle import Lifecycle
from .metrics import RouterMetrics
from .openapi import describe
from .ports import ManagerPort, OpenQueue
from .queue_link import QueueLink
from .responses.routes import response_routes
from .responses.service import Responses
from .settings import RouterSettings
from .shutdown import GracefulShutdown
from .state import RouterState
from .store import Store
from .tenant_limits import tenant_limit
from .webhooks.routes import webhook_routes

_UNKNOWN_PATH = (
    "see /docs for what there is; a path of your engines that is not built in is allowed by the setting extra_paths "
    "(INFERQ_ROUTER_EXTRA_PATHS)"
)


@dataclass(frozen=True, slots=True)
class RouterServices:
    """The long-lived objects of one Router."""

    settings: RouterSettings
    storage_settings: StorageSettings
    webhook_settings: WebhookSettings
    manager: ManagerPort | None
    store: Store
    keys: ApiKeys
    gate: Gate
    metrics: RouterMetrics
    lifecycle: Lifecycle
    shutdown: GracefulShutdown
    link: QueueLink
    requests: OpenRequests
    canceller: Canceller
    disconnect_grace: DisconnectGrace
    transfers: Transfers
    quota: StorageQuota
    jobs: PersistedJobs
    responses: Responses
    streamer: OutputStreamer
    inference: Inference

    def not_ready_reasons(self) -> list[str]:
        """Why the Router is not ready; empty: it is."""
        return self.lifecycle.not_ready_reasons or self.link.reasons

    def warnings(self) -> list[str]:
        """What is wrong though the Router is ready: requests need no Manager."""
        trouble = self.manager.trouble if isinstance(self.manager, ManagerRoute) else ""
        return [trouble] if trouble else []


def build_services(
    settings: RouterSettings,
    storage_settings: StorageSettings,
    webhook_settings: WebhookSettings,
    *,
    open_queue: OpenQueue,
    manager: ManagerPort | None,
    hurry: asyncio.Event,
) -> RouterServices:
    """The services over the queue that ``open_queue`` connects to; nothing is connected yet.

    Raises ``CannotStart`` for settings that cannot work.
    """
    metrics, lifecycle = RouterMetrics(), Lifecycle()
    local = local_callers(settings)
    keys = ApiKeys(settings.api_keys, settings.api_keys_file, local)
    single_tenant = not keys.required
    store = Store(
        ObjectStore.open(storage_settings),
        threads=settings.store_threads,
        limit_s=settings.store_limit_ms / 1000,
        alone=single_tenant,
    )

    def on_closed() -> None:
        shutdown.work_ended()

    followers = Followers(settings.client_buffer_bytes, settings.keepalive_ms / 1000)
    canceller = Canceller(lambda: link.queue, followers)
    requests = OpenRequests(
        settings,
        metrics,
        followers,
        canceller.cancel_orphan,
        on_closed,
        single_tenant=single_tenant,
    )
    transfers = Transfers(
        settings.max_transfers,
        tenant_limit(settings.tenant_transfers, settings.max_transfers, alone=single_tenant),
        on_closed,
    )
    shutdown = GracefulShutdown(
        lifecycle,
        requests,
        transfers,
        canceller,
        lame_duck_s=settings.lame_duck_ms / 1000,
        limit_s=settings.shutdown_limit_ms / 1000,
        hurry=hurry,
    )
    link = QueueLink(
        settings,
        open_queue,
        requests.deliver,
        requests.lost,
        requests.fail_all,
        manager.heard if isinstance(manager, ManagerRoute) else None,
    )
    disconnect_grace = DisconnectGrace(settings.resume_grace_ms, canceller.cancel_abandoned)
    builder = JobBuilder(settings, link)
    persisted = PersistedRequests(settings, link, requests, canceller, disconnect_grace, metrics)
    relay = Relay(link, requests, canceller, metrics, persisted)
    jobs = PersistedJobs(settings, link, requests, persisted, builder, lifecycle)
    responses = Responses(settings, link, jobs, persisted)
    return RouterServices(
        settings=settings,
        storage_settings=storage_settings,
        webhook_settings=webhook_settings,
        manager=manager,
        store=store,
        keys=keys,
        gate=Gate(keys, settings.join_token.get_secret_value(), local),
        metrics=metrics,
        lifecycle=lifecycle,
        shutdown=shutdown,
        link=link,
        requests=requests,
        canceller=canceller,
        disconnect_grace=disconnect_grace,
        transfers=transfers,
        quota=StorageQuota(store, settings.tenant_files, settings.tenant_file_bytes),
        jobs=jobs,
        responses=responses,
        streamer=OutputStreamer(requests, persisted, relay, jobs, lifecycle, metrics),
        inference=Inference(
            settings, keys, link, requests, canceller, metrics, lifecycle, builder, relay, persisted, jobs, responses
        ),
    )


def build_pages(services: RouterServices) -> FastAPI:
    """Everything that a Router answers beside inference."""
    app = FastAPI(
        title="inferq Router",
        version=version("inferq"),
        description="POST requests on inference paths (such as /v1/chat/completions) go through the queue to an engine "
        "as they are; their schema is the engine's.",
        summary="An OpenAI-compatible API over a durable queue, in front of a fleet of engines",
        docs_url=None,
        redoc_url=None,
    )
    settings, metrics, keys, gate = services.settings, services.metrics, services.keys, services.gate
    state = RouterState(
        settings=settings,
        storage_settings=services.storage_settings,
        webhook_settings=services.webhook_settings,
        manager=services.manager,
        store=services.store,
        keys=keys,
        gate=gate,
        metrics=metrics,
        link=services.link,
        requests=services.requests,
        lifecycle=services.lifecycle,
        transfers=services.transfers,
        allowance=services.quota,
        reasons=services.not_ready_reasons,
    )
    for routes in (
        health_routes(metrics.registry, services.not_ready_reasons, warnings=services.warnings),
        engine_routes(state),
        model_routes(state),
        file_routes(state),
        job_routes(gate, keys, services.jobs, services.streamer),
        batch_routes(state),
        webhook_routes(state),
        response_routes(gate, keys, services.responses, services.streamer),
        pool_routes(state),
        dead_letter_routes(state),
        manager_routes(state),
    ):
        app.include_router(routes)
    metrics.watch(
        waiting=lambda: services.requests.waiting,
        round_trips=lambda: services.link.round_trips,
        transfers=lambda: services.transfers.open,
        managed=lambda: not services.warnings(),
    )
    return prepare_app(
        app,
        metrics.registry,
        unbounded={("POST", FILES_PATH)},
        unknown_path=_UNKNOWN_PATH,
        describe=lambda document: describe(document, settings),
    )


def open_manager(url: str, join_token: str, timeout_ms: int, http: FabricHttp | None = None) -> RemoteManager:
    """The Manager that one of the setting ``manager_urls`` means; ``http`` is shared by several. Connects to nothing
    yet. Raises ``CannotStart``."""
    if url.startswith(RAY_SCHEME):
        return RayManager(url.removeprefix(RAY_SCHEME), join_token, timeout_ms)
    return HttpManager(url, join_token, http or FabricHttp(timeout_ms / 1000))


def manager_of(settings: RouterSettings) -> ManagerPort | None:
    """The way to the Managers that the settings name; None without any."""
    if not settings.manager_urls:
        return None
    token, timeout_ms = settings.join_token.get_secret_value(), settings.manager_timeout_ms
    http = FabricHttp(timeout_ms / 1000)
    return ManagerRoute(settings.manager_urls, token, lambda url: open_manager(url, token, timeout_ms, http))


def queue_opener(settings: RouterSettings, broker: BrokerSettings, manager: ManagerPort | None) -> OpenQueue:
    """Connects to Redis where the broker's settings or else the Manager say. Raises ``CannotStart`` if neither can, and
    ``BrokerUnsuitable`` for a Redis URL that is none."""
    if not broker.redis_url and manager is None:
        raise CannotStart("the router cannot know where Redis is: give --redis-url, or --manager-url to ask a Manager")
    if broker.redis_url:
        open_link(broker)  # connects to nothing: it only reads the URL

    async def open_queue() -> Broker:
        found = broker
        if not found.redis_url:
            if manager is None:
                raise BrokerUnsuitable("there is neither a Redis URL nor a Manager to ask")
            address = await manager.broker_address()
            url = await complete_url(address.broker_url)
            found = found.model_copy(update={"redis_url": url, "shards": address.shards})
        return await Broker.connect(found, budgets=settings.budgets, durability=settings.durability)

    return open_queue
