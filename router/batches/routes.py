"""``/v1/batches``: taking batches in, and telling how they stand. The batcher runs them; the store is between."""

from __future__ import annotations

import time

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from queue_schemas import Conflict
from telemetry.http.access import Access
from telemetry.http.asgi import error_response, error_responses

from ..http.bodies import page_body
from ..idempotency import Idempotency, read_sent
from ..state import RouterState
from .rules import batch_endpoints, check_batch_cursor, read_batch
from .schemas import batch_list, batch_object
from .service import BatchService

_ALL = "/v1/batches"


class BatchCreate(BaseModel):
    """What ``POST /v1/batches`` takes; for the OpenAPI document (:mod:`router.batches.rules` reads the body)."""

    class OutputExpiresAfter(BaseModel):
        anchor: str = "created_at"
        seconds: int = Field(ge=3_600, le=2_592_000)

    input_file_id: str
    endpoint: str
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None
    output_expires_after: OutputExpiresAfter | None = None


def batch_routes(state: RouterState) -> APIRouter:
    """The paths below ``/v1/batches``."""
    routes = APIRouter(tags=["batches"], dependencies=[state.gate.allow(Access.CLIENT)])
    idempotency = Idempotency(state.store.requests, state.settings.keep_answers_ms)
    context = BatchService(
        state.settings, state.storage_settings.batch_input_bytes, state.store.files, state.store.batches, idempotency
    )
    endpoints = batch_endpoints(state.settings.paths)

    @routes.post(
        _ALL,
        summary="Run every line of an uploaded file",
        responses=error_responses(400, 401, 413, 422, 429, 503, 507),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": BatchCreate.model_json_schema()}},
            }
        },
    )
    async def create(request: Request) -> JSONResponse:
        tenant = state.keys.caller(request)
        sent = read_sent(request)
        asked = read_batch(await page_body(request), endpoints, state.settings.batch_windows)
        now_s = time.time()
        batch, claim = await state.store.run(lambda: context.create(tenant, asked, sent, now_s), tenant=tenant)
        return await idempotency.answer(request, claim, batch_object(batch), state.store.later)

    @routes.get(_ALL, summary="Your batches, newest first", responses=error_responses(400, 401, 429, 503))
    async def page(request: Request, after: str = Query(""), limit: int = Query(20, ge=1, le=100)) -> JSONResponse:
        tenant = state.keys.caller(request)
        cursor = check_batch_cursor(after)
        found, more = await state.store.read_page(tenant, lambda: context.page(tenant, cursor, limit))
        return JSONResponse(batch_list(found, more=more))

    @routes.get(_ALL + "/{batch_id}", summary="How one stands", responses=error_responses(401, 404, 429, 503))
    async def one(batch_id: str, request: Request) -> JSONResponse:
        tenant = state.keys.caller(request)
        return JSONResponse(batch_object(await state.store.run(lambda: context.get(tenant, batch_id), tenant=tenant)))

    @routes.post(
        _ALL + "/{batch_id}/cancel",
        summary="End one early; lines that are done are kept",
        responses=error_responses(401, 404, 409, 429, 503),
    )
    async def cancel(batch_id: str, request: Request) -> Response:
        tenant = state.keys.caller(request)
        now_s = time.time()
        try:
            batch = await state.store.run(lambda: context.cancel(tenant, batch_id, now_s), tenant=tenant)
        except Conflict as error:
            refused = error_response(error)
            # The SDK takes every 409 for a lock that will be free soon, and asks again.
            refused.headers["x-should-retry"] = "false"
            return refused
        return JSONResponse(batch_object(batch))

    return routes
