"""``/v1/batches``: creates, lists, shows and cancels batches."""

from __future__ import annotations

import time
from collections.abc import Collection

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from openai_api.pages import page_of
from telemetry.http.access import Access
from telemetry.http.error_answers import error_responses

from ..http.access import Gate
from ..http.bodies import read_request_body
from ..http.json_body import body_schema
from ..idempotency import Idempotency, read_request_key
from ..store import AsyncStore
from .rules import check_batch_cursor, read_batch
from .schemas import BatchCreate, batch_object
from .service import BatchService

_ALL = "/v1/batches"
_ONE = _ALL + "/{batch_id}"


def batch_routes(
    batches: BatchService,
    store: AsyncStore,
    idempotency: Idempotency,
    gate: Gate,
    *,
    endpoints: Collection[str],
    windows: Collection[str],
) -> APIRouter:
    """The routes of one Router. ``store`` runs what ``batches`` does, which blocks. ``endpoints`` and ``windows``: what
    a batch may choose."""
    routes = APIRouter(tags=["batches"], dependencies=[gate.allow(Access.CLIENT)])

    @routes.post(
        _ALL,
        summary="Run every line of an uploaded file",
        responses=error_responses(400, 401, 413, 422, 429, 503, 507),
        openapi_extra=body_schema(BatchCreate),
    )
    async def create(request: Request) -> JSONResponse:
        tenant, key, now_s = gate.tenant_of(request), read_request_key(request), time.time()
        params = read_batch(await read_request_body(request), endpoints, windows)
        batch, execution = await store.run(lambda: batches.create(tenant, params, key, now_s), tenant=tenant)
        return await idempotency.response(request, execution, batch_object(batch))

    @routes.get(_ALL, summary="Your batches, newest first", responses=error_responses(400, 401, 429, 503))
    async def page(request: Request, after: str = Query(""), limit: int = Query(20, ge=1, le=100)) -> JSONResponse:
        tenant, cursor = gate.tenant_of(request), check_batch_cursor(after)
        found, more = await store.read_page(tenant, lambda: batches.page(tenant, cursor, limit))
        return JSONResponse(page_of([batch_object(batch) for batch in found], has_more=more))

    @routes.get(_ONE, summary="One of them", responses=error_responses(401, 404, 429, 503))
    async def one(batch_id: str, request: Request) -> JSONResponse:
        tenant = gate.tenant_of(request)
        return JSONResponse(batch_object(await store.run(lambda: batches.get(tenant, batch_id), tenant=tenant)))

    @routes.post(
        _ONE + "/cancel",
        summary="End one early; lines that are done are kept",
        responses=error_responses(401, 404, 409, 429, 503),
    )
    async def cancel(batch_id: str, request: Request) -> JSONResponse:
        tenant, now_s = gate.tenant_of(request), time.time()
        batch = await store.run(lambda: batches.cancel(tenant, batch_id, now_s), tenant=tenant)
        return JSONResponse(batch_object(batch))

    return routes
