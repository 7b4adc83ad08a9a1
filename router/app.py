"""The Router as one ASGI app: inference goes the short way, everything else to FastAPI.

The same app runs under uvicorn (:mod:`router.service`), in tests without a socket, and in whatever else speaks ASGI
with lifespan. The services behind it are built in :mod:`router.composition`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from broker import BrokerSettings
from queue_schemas import MethodNotAllowed, PathNotFound
from storage import StorageSettings
from telemetry.http.access import DeclaredRoute, declared
from telemetry.http.connections import RequestCycle
from telemetry.http.connections.shared_accept import PauseBeforeAccept
from telemetry.http.methods import allow_header, answered_methods
from telemetry.http.request_context import request_id_from
from telemetry.http.server import refuse_unguarded, run_server
from webhooks.settings import WebhookSettings

from .composition import RouterServices, build_services, build_web_app, manager_of, queue_opener
from .http.connection import Connection
from .http.cors import with_cors
from .http.extra_paths import check_extra_paths
from .http.response_writer import ResponseWriter
from .inference.routes import InferenceRoutes
from .ports import ManagerPort, OpenQueue
from .processes.sibling_link import SiblingLink
from .settings import RouterSettings
from .workers.routes import WorkerEntry

STORE_CLOSE_LIMIT_S = 2.0
"""How long the last calls to the file store may take at the end."""

_READY_LOOK_S = 0.02


class RouterApp:
    """An ASGI app. Under a server without lifespan, run it within :meth:`running`."""

    def __init__(self, services: RouterServices) -> None:
        self.services = services
        self._paths = services.settings.paths
        self._web_app = build_web_app(services)
        self._worker_entry = WorkerEntry(services.worker_calls, services.metrics.registry)
        check_extra_paths(
            self._web_app, services.settings.extra_paths, variable=services.settings.variable("extra_paths")
        )
        self._entry = with_cors(self._serve, services.settings.cors_allow_origins)
        self._has_cors = bool(services.settings.cors_allow_origins)
        self._background: list[Callable[[], Coroutine[Any, Any, None]]] = [
            services.link.run,
            services.canceller.run,
            self._sweep,
            services.workers.keep_agreeing,
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        await self._entry(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.services.lifecycle.leaving:
            send = _closing(send)
        path: str = scope["path"]
        if path in self._paths:
            # The path as it was written, too: what was encoded or mounted elsewhere is another path.
            if scope.get("raw_path", path.encode()) == path.encode():
                if scope["method"] == "POST":
                    await self.services.inference.serve(scope, receive, send, path)
                else:
                    await self._refuse_method(scope, send, path)
                return
            await self._refuse_spelling(scope, send)
            return
        if await self._worker_entry.serve(scope, receive, send):
            return
        state = scope.setdefault("state", {})
        state["connection"] = Connection(receive)
        try:
            await self._web_app(scope, receive, send)
        finally:
            del state["connection"]  # it leads back to the scope

    def serve_directly(self, cycle: RequestCycle) -> bool:
        """Answer a request that has arrived whole without a task, or leave it to :meth:`__call__`: False."""
        scope = cycle.scope
        path = scope["path"]
        return (
            path in self._paths
            and scope["method"] == "POST"
            and scope["raw_path"] == path.encode()
            and not self.services.lifecycle.shutting_down
            and not (self._has_cors and any(name == b"origin" for name, _ in scope["headers"]))
            and self.services.inference.serve_directly(cycle, path)
        )

    async def listen(
        self,
        sock: socket.socket,
        *,
        stop: asyncio.Event,
        shutdown_timeout_s: float,
        stop_accepting: asyncio.Event | None = None,
        pause_before_accept: PauseBeforeAccept | None = None,
    ) -> None:
        """Serve ``sock`` by our own server, as :func:`telemetry.http.server.run_server` does, with the limits of the
        settings and requests answered directly. Run it within :meth:`running`."""
        await run_server(
            self,
            sock=sock,
            stop=stop,
            stop_accepting=stop_accepting,
            shutdown_timeout_s=shutdown_timeout_s,
            limits=self.services.settings.connection_limits,
            pause_before_accept=pause_before_accept,
            serve_directly=self.serve_directly,
        )

    def declared_routes(self) -> list[DeclaredRoute]:
        """Every method and path that it answers, with who may call it."""
        inference = [DeclaredRoute("POST", path, InferenceRoutes.access) for path in sorted(self._paths)]
        return [*inference, *declared(self._web_app)]

    def add_background(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Have ``run`` run beside the app's own background tasks, until it is cancelled."""
        self._background.append(run)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """What the app needs in the background runs within; at the end the open requests are drained.

        Raises a group with ``BrokerUnsuitable`` if the first Redis that answers cannot carry the queue.
        """
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(), name=run.__qualname__) for run in self._background]
            try:
                yield
            finally:
                try:
                    await self.drain()
                finally:
                    self.services.workers.close()
                    for task in tasks:
                        task.cancel()
        await self.services.store.close(STORE_CLOSE_LIMIT_S)
        if self.services.manager is not None:
            await self.services.manager.close()

    async def ready_within(self, limit_s: float, or_until: asyncio.Event | None = None) -> None:
        """Return once the Router is ready, or after ``limit_s``: then somebody must answer, if only why it is not
        ready. Also when ``or_until`` is set."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while self.services.not_ready_reasons() and not (or_until is not None and or_until.is_set()):  # noqa: ASYNC110
                    await asyncio.sleep(_READY_LOOK_S)  # many reasons, no one event

    async def leave(self) -> None:
        """:meth:`router.shutdown.GracefulShutdown.leave`."""
        await self.services.shutdown.leave()

    async def drain(self) -> None:
        """:meth:`router.shutdown.GracefulShutdown.drain`."""
        await self.services.shutdown.drain()

    async def _sweep(self) -> None:
        """Enforce the limits in time that no timer of their own watches."""
        services, time = self.services, asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(services.settings.sweep_interval_ms / 1000)
            services.requests.sweep(time())
            services.disconnect_grace.sweep(time())
            services.keys.refresh()
            services.worker_credentials.refresh()
            await services.workers.sweep()

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        async with self.running():
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def _refuse_method(self, scope: Scope, send: Send, path: str) -> None:
        writer = ResponseWriter(send, request_id_from(scope["headers"]).encode(), scope["path"])
        allow = (b"allow", allow_header(answered_methods(self._web_app, path) | {"OPTIONS", "POST"}).encode())
        if scope["method"] == "OPTIONS":
            writer.add_header(*allow)
            await writer.empty(204)
        else:
            await writer.fail(MethodNotAllowed(f"{path} does not answer {scope['method']}: use POST"), headers=[allow])
        self.services.metrics.answered(path, writer.status)

    async def _refuse_spelling(self, scope: Scope, send: Send) -> None:
        writer = ResponseWriter(send, request_id_from(scope["headers"]).encode(), scope["path"])
        await writer.fail(PathNotFound("paths must be written plainly, without percent signs"))
        self.services.metrics.answered("unknown", writer.status)


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
    hurry: asyncio.Event | None = None,
    siblings: SiblingLink | None = None,
) -> RouterApp:
    """The app. Without a Redis URL in ``broker_settings`` it asks the Manager where Redis is.

    ``open_queue`` and ``manager`` replace the real ones; ``hurry`` is set to end open requests at once. ``siblings``
    leads to the other processes that serve the port. Raises ``CannotStart`` for settings that cannot work and
    ``BrokerUnsuitable`` for a Redis URL that is none.
    """
    manager = manager or manager_of(settings)
    services = build_services(
        settings,
        storage_settings or StorageSettings.load(),
        webhook_settings or WebhookSettings.load(),
        open_queue=open_queue or queue_opener(settings, broker_settings or BrokerSettings.load(), manager),
        manager=manager,
        hurry=hurry or asyncio.Event(),
        siblings=siblings,
    )
    refuse_unguarded(
        settings.host,
        guarded=services.keys.required,
        insecure=settings.insecure,
        remedy="give API keys (INFERQ_ROUTER_API_KEYS_FILE or INFERQ_ROUTER_API_KEYS)",
    )
    refuse_unguarded(
        settings.host,
        guarded=manager is None or bool(settings.join_token.get_secret_value()),
        insecure=settings.insecure,
        remedy="set INFERQ_JOIN_TOKEN: without it anyone may join and read Redis's address",
    )
    return RouterApp(services)
