"""Builds the services of one Router, each once, and hands every feature's routes only what they use.

:func:`build_services` makes the long-lived objects, :func:`build_web_app` the FastAPI app on top of them. Only
:mod:`router.app` and tests see :class:`RouterServices`; no feature does.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from importlib.metadata import version

from fastapi import APIRouter, FastAPI

from broker import Broker, BrokerSettings
from broker.embedded.local_password import complete_url
from broker.redis.link import open_link
from queue_schemas import BrokerUnsuitable, CannotStart
from queue_schemas.fleet.acting_manager import RAY_SCHEME
from queue_schemas.worker_protocol.fields import WORKER_PREFIX
from storage import ObjectStore, StorageSettings
from telemetry import render_metrics
from telemetry.http.app import health_routes, prepare_app
from telemetry.http.fabric_calls import FabricHttp
from telemetry.http.loopback_access import LoopbackAccess
from webhooks.settings import WebhookSettings

from .batches.routes import batch_routes
from .batches.rules import batch_endpoints
from .batches.service import BatchService
from .files.downloads import Downloads
from .files.quota import StorageQuota
from .files.routes import FILES_PATH, file_routes
from .files.service import FileService
from .files.transfers import Transfers
from .files.uploads import Uploads
from .fleet.dead_letter_routes import dead_letter_routes
from .fleet.manager_client import HttpManager, RemoteManager
from .fleet.manager_failover import ManagerRoute
from .fleet.manager_routes import manager_routes
from .fleet.model_routes import model_routes
from .fleet.pool_figures import PoolFigures
from .fleet.pool_routes import pool_routes
from .fleet.ray_manager import RayManager
from .fleet.vllm_routes import vllm_routes
from .http.access import Gate
from .http.api_keys import ApiKeys
from .idempotency import Idempotency
from .inference.cancellation import Canceller
from .inference.followers import Followers
from .inference.job_builder import JobBuilder
from .inference.open_requests import OpenRequests
from .inference.relay import Relay
from .inference.routes import InferenceRoutes
from .inference.service import InferenceService
from .jobs.disconnect_grace import DisconnectGrace
from .jobs.output_streamer import OutputStreamer
from .jobs.persisted_requests import PersistedRequests
from .jobs.routes import job_routes
from .jobs.service import JobService
from .lifecycle import Lifecycle
from .metrics import OPEN_REQUESTS, RouterMetrics
from .openapi import describe
from .ports import ManagerPort, OpenQueue
from .processes.merged_metrics import render_snapshot, sample_value
from .processes.sibling_link import SiblingLink
from .queue_link import QueueLink
from .responses.chat_only_engines import ChatOnlyEngines
from .responses.routes import response_routes
from .responses.service import ResponseService
from .settings import RouterSettings
from .shutdown import GracefulShutdown
from .store import AsyncStore
from .tenant_limits import tenant_limit
from .webhooks.endpoint_tests import EndpointTests
from .webhooks.routes import webhook_routes
from .webhooks.service import WebhookService
from .workers.calls import WorkerCalls
from .workers.credentials import WorkerCredentials
from .workers.membership import Membership, Registry
from .workers.routes import worker_routes
from .workers.service import WorkerService

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
    store: AsyncStore
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
    jobs: JobService
    responses: ResponseService
    streamer: OutputStreamer
    inference: InferenceRoutes
    pools: PoolFigures
    workers: WorkerService
    worker_credentials: WorkerCredentials
    worker_calls: WorkerCalls
    siblings: SiblingLink | None

    def not_ready_reasons(self) -> list[str]:
        """Why the Router is not ready; empty: it is."""
        return self.lifecycle.not_ready_reasons or self.link.reasons

    def warnings(self) -> list[str]:
        """What is wrong though the Router is ready: requests need no Manager."""
        trouble = self.manager.trouble if isinstance(self.manager, ManagerRoute) else ""
        return [trouble] if trouble else []

    async def render_metrics(self) -> tuple[bytes, str]:
        """``/metrics`` of all processes that serve the port."""
        if self.siblings is None:
            page, content_type = render_metrics(self.metrics.registry)
        else:
            page, content_type = render_snapshot(await self.siblings.merged(self.metrics.registry))
        return page + await self.pools.render_metrics(), content_type

    async def open_requests(self) -> int:
        """The open requests of all processes that serve the port."""
        if self.siblings is None:
            return len(self.requests)
        return int(sample_value(await self.siblings.merged(self.metrics.registry), OPEN_REQUESTS))


def build_services(
    settings: RouterSettings,
    storage_settings: StorageSettings,
    webhook_settings: WebhookSettings,
    *,
    open_queue: OpenQueue,
    manager: ManagerPort | None,
    hurry: asyncio.Event,
    siblings: SiblingLink | None = None,
) -> RouterServices:
    """The services over the queue that ``open_queue`` connects to; nothing is connected yet.

    Raises ``CannotStart`` for settings that cannot work.
    """
    metrics, lifecycle = RouterMetrics(), Lifecycle()
    local = LoopbackAccess.of(settings.host, insecure=settings.insecure, origins=settings.cors_allow_origins)
    keys = ApiKeys(settings.api_keys, settings.api_keys_file, local)
    single_tenant = not keys.required
    store = AsyncStore(
        ObjectStore.open(storage_settings),
        threads=settings.store_threads,
        timeout_s=settings.store_timeout_ms / 1000,
        single_tenant=single_tenant,
    )

    def on_closed() -> None:
        shutdown.work_ended()

    followers = Followers(settings.max_client_buffer_bytes, settings.keepalive_interval_ms / 1000)
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
        settings.max_concurrent_transfers,
        tenant_limit(
            settings.max_tenant_concurrent_transfers, settings.max_concurrent_transfers, single_tenant=single_tenant
        ),
        on_closed,
    )
    shutdown = GracefulShutdown(
        lifecycle,
        requests,
        transfers,
        canceller,
        lame_duck_s=settings.lame_duck_ms / 1000,
        limit_s=settings.shutdown_timeout_ms / 1000,
        hurry=hurry,
    )
    link = QueueLink(
        settings,
        open_queue,
        requests.deliver,
        requests.lost,
        requests.fail_all,
        manager.note_acting if isinstance(manager, ManagerRoute) else None,
    )
    disconnect_grace = DisconnectGrace(settings.resume_grace_ms, canceller.cancel_abandoned)
    persisted = PersistedRequests(settings, link, requests, canceller, disconnect_grace, metrics)
    relay = Relay(link, requests, canceller, metrics, persisted.catch_up)
    jobs = JobService(settings, link, requests, persisted, lifecycle)
    responses = ResponseService(settings, link, jobs, persisted, ChatOnlyEngines(time.monotonic))
    inference = InferenceService(
        settings,
        link,
        requests,
        canceller,
        metrics,
        JobBuilder(settings, link),
        relay,
        persisted=persisted,
        background=jobs,
        responses=responses,
    )
    join_token = settings.join_token.get_secret_value()
    registry = Registry()
    workers = WorkerService(
        link,
        Membership(manager, join_token, registry),
        registry,
        lifecycle,
        max_answer_bytes=settings.max_worker_answer_bytes,
    )
    worker_credentials = WorkerCredentials(
        settings.worker_credentials_file,
        join_token,
        replace(local, origins=frozenset()),
        guarded=keys.required,
    )
    worker_credentials.changed = workers.polls.end_all
    return RouterServices(
        settings=settings,
        storage_settings=storage_settings,
        webhook_settings=webhook_settings,
        manager=manager,
        store=store,
        keys=keys,
        gate=Gate(keys, join_token, local),
        metrics=metrics,
        lifecycle=lifecycle,
        shutdown=shutdown,
        link=link,
        requests=requests,
        canceller=canceller,
        disconnect_grace=disconnect_grace,
        transfers=transfers,
        quota=StorageQuota(store, settings.max_tenant_files, settings.max_tenant_file_bytes),
        jobs=jobs,
        responses=responses,
        streamer=OutputStreamer(requests, persisted, relay, jobs, lifecycle, metrics),
        inference=InferenceRoutes(
            inference, keys, requests, relay, lifecycle, metrics, max_body_bytes=settings.max_body_bytes
        ),
        pools=PoolFigures(link, settings.scaling_rules),
        workers=workers,
        worker_credentials=worker_credentials,
        worker_calls=WorkerCalls(workers, worker_credentials),
        siblings=siblings,
    )


def build_web_app(services: RouterServices) -> FastAPI:
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
    settings, metrics, gate = services.settings, services.metrics, services.gate
    link, lifecycle = services.link, services.lifecycle
    for routes in (
        health_routes(
            metrics.registry,
            services.not_ready_reasons,
            warnings=services.warnings,
            render=services.render_metrics,
        ),
        vllm_routes(services.not_ready_reasons, lifecycle, services.open_requests),
        model_routes(link, gate, settings.on_no_worker),
        *_store_routes(services),
        job_routes(services.jobs, services.streamer, gate),
        response_routes(services.responses, services.streamer, gate),
        pool_routes(services.pools, gate),
        dead_letter_routes(link, gate),
        manager_routes(services.manager, gate, metrics.registry, lifecycle),
        worker_routes(services.workers, services.worker_credentials, services.worker_calls),
    ):
        app.include_router(routes)
    metrics.watch(
        open_requests=lambda: services.requests.waiting,
        round_trips=lambda: services.link.round_trips,
        transfers=lambda: services.transfers.open,
        manager_reachable=lambda: not services.warnings(),
    )
    return prepare_app(
        app,
        metrics.registry,
        unbounded=lambda method, path: method == "POST" and (path == FILES_PATH or path.startswith(WORKER_PREFIX)),
        unknown_path=_UNKNOWN_PATH,
        describe=lambda document: describe(document, settings),
    )


def _store_routes(services: RouterServices) -> list[APIRouter]:
    """The routes over the file store: files, batches, webhooks."""
    settings, gate, store = services.settings, services.gate, services.store
    metrics, transfers, quota = services.metrics, services.transfers, services.quota
    idempotency = Idempotency(store, settings.idempotency_retention_ms)
    files = FileService(store.files, store.batches)
    uploads = Uploads(settings, store, idempotency, transfers, quota, metrics, services.lifecycle)
    batches = BatchService(
        store.files,
        store.batches,
        idempotency,
        max_input_bytes=services.storage_settings.max_batch_input_bytes,
        max_live=settings.max_tenant_batches,
    )
    endpoints = batch_endpoints(settings.paths)
    webhooks = WebhookService(
        store.endpoints, store.deliveries, services.webhook_settings.max_tenant_endpoints, idempotency
    )
    tests = EndpointTests(store, store.deliveries, webhooks)
    return [
        file_routes(files, store, uploads, Downloads(store, files, transfers, metrics), quota, gate),
        batch_routes(batches, store, idempotency, gate, endpoints=endpoints, windows=settings.batch_windows),
        webhook_routes(webhooks, tests, store, idempotency, gate, services.webhook_settings.rules),
    ]


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
