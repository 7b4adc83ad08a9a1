"""The Router as one ASGI app: inference goes the short way, everything else to FastAPI.

The same app runs under uvicorn (:mod:`router.service`), in tests without a socket, and in whatever else speaks ASGI
with lifespan.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Message, Receive, Scope, Send

from broker import Broker, BrokerSettings
from broker.embedded.local_password import complete_url
from broker.redis.link import open_link
from queue_schemas import BrokerUnsuitable, CannotStart, MethodNotAllowed, PathNotFound
from queue_schemas.fleet.acting_manager import RAY_SCHEME
from storage import ObjectStore, StorageSettings
from telemetry.http.access import DeclaredRoute, declared
from telemetry.http.asgi import request_id_from
from telemetry.http.fabric_calls import FabricHttp
from telemetry.http.methods import allow_header, answered_methods
from telemetry.http.server import refuse_unguarded
from webhooks.url_settings import WebhookSettings

from .fleet.manager_client import HttpManager, RemoteManager
from .fleet.manager_failover import ManagerRoute
from .fleet.ray_manager import RayManager
from .fleet.routes import build_pages
from .http.connection import Connection
from .http.cors import with_cors
from .http.own_paths import refuse_own_paths
from .http.response_writer import ResponseWriter
from .inference.routes import Inference
from .ports import ManagerPort, OpenQueue
from .settings import RouterSettings
from .state import RouterState
from .store import Store

_LOOK_S = 0.05
"""How often a Router that leaves looks whether the answers are complete that did not say so."""


class RouterApp:
    """An ASGI app. Under a server without lifespan, run it within :meth:`running`."""

    def __init__(self, state: RouterState) -> None:
        self.state = state
        self._paths = state.settings.paths
        self._inference = Inference(state)
        self._pages = build_pages(state)
        refuse_own_paths(self._pages, state.settings.extra_paths)
        self._entry = with_cors(self._serve, state.settings.cors_allow_origins)
        self._leave_by = float("inf")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        await self._entry(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.state.leaving:
            send = _closing(send)
        path: str = scope["path"]
        if path in self._paths:
            # The path as it was written, too: what was encoded or mounted elsewhere is another path.
            if scope.get("raw_path", path.encode()) == path.encode():
                if scope["method"] == "POST":
                    await self._inference.serve(scope, receive, send, path)
                else:
                    await self._refuse_method(scope, send, path)
                return
            await self._refuse_spelling(scope, send)
            return
        scope.setdefault("state", {})["connection"] = Connection(receive)
        await self._pages(scope, receive, send)

    def declared_routes(self) -> list[DeclaredRoute]:
        """Every method and path that it answers, with who may call it."""
        inference = [DeclaredRoute("POST", path, Inference.access) for path in sorted(self._paths)]
        return [*inference, *declared(self._pages)]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """What the app needs in the background runs within; at the end the open requests are drained.

        Raises a group with ``BrokerUnsuitable`` if the first Redis that answers cannot carry the queue.
        """
        async with self.state.running():
            try:
                yield
            finally:
                await self.drain()

    async def leave(self) -> None:
        """For ``lame_duck_ms``: serve on, but say on /readyz and with each answer that clients should go elsewhere.

        Answers that are under way did not say so, and their connections will be used again: the time runs from the end
        of the last of them. Together with :meth:`drain` it takes ``lame_duck_ms`` and ``shutdown_limit_ms`` at most.
        """
        requests, settings = self.state.requests, self.state.settings
        time, lame_duck_s = asyncio.get_running_loop().time, settings.lame_duck_ms / 1000
        self.state.leaving = True
        unwarned = requests.now_open()
        until = time() + lame_duck_s
        self._leave_by = until + settings.shutdown_limit_ms / 1000
        while (now := time()) < until and not self.state.hurry.is_set():
            await asyncio.sleep(min(until - now, _LOOK_S))
            if not unwarned.isdisjoint(requests.now_open()):
                until = min(time() + lame_duck_s, self._leave_by)

    async def drain(self) -> None:
        """Refuse new requests, let the open ones finish within the limit, end the rest with an error."""
        left_s = self._leave_by - asyncio.get_running_loop().time()
        await self.state.drain(max(0.0, min(self.state.settings.shutdown_limit_ms / 1000, left_s)))

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        async with self.running():
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def _refuse_method(self, scope: Scope, send: Send, path: str) -> None:
        exchange = ResponseWriter(send, request_id_from(scope["headers"]).encode(), scope["path"])
        allow = (b"allow", allow_header(answered_methods(self._pages, path) | {"OPTIONS", "POST"}).encode())
        if scope["method"] == "OPTIONS":
            exchange.add_header(*allow)
            await exchange.empty(204)
        else:
            await exchange.fail(
                MethodNotAllowed(f"{path} does not answer {scope['method']}: use POST"), headers=[allow]
            )
        self.state.metrics.answered(path, exchange.status)

    async def _refuse_spelling(self, scope: Scope, send: Send) -> None:
        exchange = ResponseWriter(send, request_id_from(scope["headers"]).encode(), scope["path"])
        await exchange.fail(PathNotFound("paths must be written plainly, without percent signs"))
        self.state.metrics.answered("unknown", exchange.status)


def _closing(send: Send) -> Send:
    """``send`` that asks the client to open another connection for its next request."""

    async def close_after(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
        await send(message)

    return close_after


def build_router(
    settings: RouterSettings,
    broker_settings: BrokerSettings | None = None,
    storage_settings: StorageSettings | None = None,
    webhook_settings: WebhookSettings | None = None,
    *,
    open_queue: OpenQueue | None = None,
    manager: ManagerPort | None = None,
) -> RouterApp:
    """The app. Without a Redis URL in ``broker_settings`` it asks the Manager where Redis is.

    ``open_queue`` and ``manager`` replace the real ones. Raises ``CannotStart`` for settings that cannot work and
    ``BrokerUnsuitable`` for a Redis URL that is none.
    """
    token = settings.join_token.get_secret_value()
    if manager is None and settings.manager_urls:
        limit_ms = settings.manager_timeout_ms
        http = FabricHttp(limit_ms / 1000)
        manager = ManagerRoute(settings.manager_urls, token, lambda url: open_manager(url, token, limit_ms, http))
    if open_queue is None:
        open_queue = _queue_opener(settings, broker_settings or BrokerSettings.load(), manager)
    storage_settings = storage_settings or StorageSettings.load()
    objects = ObjectStore.open(storage_settings)
    alone = not (settings.api_keys or settings.api_keys_file)
    store = Store(objects, threads=settings.store_threads, limit_s=settings.store_limit_ms / 1000, alone=alone)
    state = RouterState(
        settings, open_queue, manager, store, storage_settings, webhook_settings or WebhookSettings.load()
    )
    refuse_unguarded(
        settings.host,
        guarded=state.keys.required,
        insecure=settings.insecure,
        remedy="give API keys (INFERQ_ROUTER_API_KEYS_FILE or INFERQ_ROUTER_API_KEYS)",
    )
    refuse_unguarded(
        settings.host,
        guarded=manager is None or bool(token),
        insecure=settings.insecure,
        remedy="set INFERQ_JOIN_TOKEN: without it anyone may join and read Redis's address",
    )
    return RouterApp(state)


def open_manager(url: str, join_token: str, timeout_ms: int, http: FabricHttp | None = None) -> RemoteManager:
    """The Manager that one of the setting ``manager_urls`` means; ``http`` is shared by several. Connects to nothing
    yet. Raises ``CannotStart``."""
    if url.startswith(RAY_SCHEME):
        return RayManager(url.removeprefix(RAY_SCHEME), join_token, timeout_ms)
    return HttpManager(url, join_token, http or FabricHttp(timeout_ms / 1000))


def _queue_opener(settings: RouterSettings, broker: BrokerSettings, manager: ManagerPort | None) -> OpenQueue:
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
