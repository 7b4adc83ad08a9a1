"""The worker's own HTTP service: health, readiness, status, drain, metrics. No inference request comes this way."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from queue_schemas import EngineState, SessionId
from queue_schemas.addresses import public_message
from telemetry import MetricsRegistry
from telemetry.http.access import Access, allow, allow_members
from telemetry.http.app import health_routes, prepare_app
from telemetry.http.error_answers import error_responses
from telemetry.http.loopback_access import LoopbackAccess


class Health(BaseModel):
    """Which session answers here: the Manager's failure detector compares it with the registered one."""

    status: str = "alive"
    worker_id: str
    session_id: SessionId


class Status(BaseModel):
    """Everything that people ask about a worker."""

    worker_id: str
    session_id: SessionId
    ready: bool
    reasons: list[str]
    draining: bool
    engine: EngineState
    engine_detail: str
    models: list[str]
    slots: int
    running: int
    broker_ok: bool
    manager_url: str
    assignment: tuple[int, int]
    """(term, version) of the assignment in force."""


class DrainAnswer(BaseModel):
    """The drain has begun; the worker ends when its jobs have."""

    draining: bool = True
    running: int


def make_app(
    status: Callable[[], Status],
    drain: Callable[[], None],
    registry: MetricsRegistry,
    join_token: str,
    local: LoopbackAccess | None = None,
) -> FastAPI:
    """The app; ``status`` is asked for every page, ``drain`` is called by ``POST /drain``. ``local``:
    who may read more than health where there is no ``join_token``."""
    members = allow_members(join_token, local or LoopbackAccess())
    app = FastAPI(title="inferq worker", docs_url=None, redoc_url=None)
    prepare_app(app, registry)
    app.include_router(health_routes(registry, lambda: status().reasons))

    @app.get(
        "/health",
        summary="Which worker, and which session of it, answers here",
        dependencies=[allow(Access.PUBLIC)],
    )
    async def health() -> Health:
        now = status()
        return Health(worker_id=now.worker_id, session_id=now.session_id)

    @app.get(
        "/ready",
        summary="Whether it can run jobs, and if not, why (503)",
        dependencies=[allow(Access.PUBLIC)],
    )
    async def ready() -> JSONResponse:
        now = status()
        reasons = [public_message(reason) for reason in now.reasons]
        return JSONResponse({"ready": now.ready, "reasons": reasons}, 200 if now.ready else 503)

    @app.get("/status", summary="Engine, slots, models, membership", dependencies=[members])
    async def show_status() -> Status:
        return status()

    @app.post(
        "/drain",
        status_code=202,
        summary="Claim no more, finish what runs, end",
        responses=error_responses(401, 415),
        dependencies=[members],
    )
    async def begin_drain() -> DrainAnswer:
        drain()
        return DrainAnswer(running=status().running)

    return app
