"""``/v1/webhook_endpoints``: where tenants want to hear what ended. The notifier sends; the store is between."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from queue_schemas import BadRequest, Conflict, NoNotifier, OverCapacity, Tenant
from telemetry.http.access import Access
from telemetry.http.asgi import error_response, error_responses
from webhooks.deliveries import DeliveryKey
from webhooks.events import EVENT_TYPES

from ..http.bodies import page_body
from ..idempotency import Idempotency, read_sent
from ..state import RouterState
from .rules import MAX_KEEP_S, NAME_CHARS, read_endpoint_change, read_new_endpoint, read_rotation, read_test
from .schemas import delivery_object, endpoint_object, list_object
from .service import WebhookService

_ALL = "/v1/webhook_endpoints"
_ONE = _ALL + "/{webhook_endpoint_id}"
_TEST_LIMIT_S = 15.0
_TEST_EVERY_S = 0.2
_MAX_TESTS = 4
"""Of one tenant at once: each looks at the store again and again while it waits."""


class EndpointCreate(BaseModel):
    """What ``POST /v1/webhook_endpoints`` takes; for the OpenAPI document, as are the others."""

    url: str
    event_types: list[str]
    name: str = Field("", max_length=NAME_CHARS)


class EndpointChange(BaseModel):
    url: str | None = None
    event_types: list[str] | None = None
    name: str | None = Field(None, max_length=NAME_CHARS)
    enabled: bool | None = None


class SecretRotation(BaseModel):
    keep_old_secret_active_for_24_hours: bool = False
    keep_old_secret_s: int | None = Field(None, ge=0, le=MAX_KEEP_S)


class EndpointTest(BaseModel):
    event_type: str


def webhook_routes(state: RouterState) -> APIRouter:
    """The paths below ``/v1/webhook_endpoints``."""
    routes = APIRouter(tags=["webhooks"], dependencies=[state.gate.allow(Access.CLIENT)])
    store, rules = state.store, state.webhook_settings.rules
    tests: Counter[Tenant] = Counter()
    idempotency = Idempotency(store.requests, state.settings.keep_answers_ms)
    context = WebhookService(store.webhooks, store.deliveries, state.webhook_settings.max_tenant_endpoints, idempotency)

    @routes.post(
        _ALL,
        summary="Have events sent to a URL; the answer shows the secret, once",
        responses=error_responses(400, 401, 413, 422, 429, 503, 507),
        openapi_extra=_takes(EndpointCreate),
    )
    async def create(request: Request) -> JSONResponse:
        tenant = state.keys.caller(request)
        asked = read_new_endpoint(await page_body(request), rules)
        sent, now_s = read_sent(request), time.time()
        endpoint, keys, claim = await store.run(lambda: context.create(tenant, asked, sent, now_s), tenant=tenant)
        return await idempotency.answer(request, claim, endpoint_object(endpoint, keys, shown=True), store.later)

    @routes.get(_ALL, summary="Your endpoints, newest first", responses=error_responses(400, 401, 429, 503))
    async def page(
        request: Request, after: str = Query("", max_length=80), limit: int = Query(20, ge=1, le=100)
    ) -> JSONResponse:
        tenant = state.keys.caller(request)
        found, more = await store.read_page(tenant, lambda: context.page(tenant, after, limit))
        return JSONResponse(list_object([endpoint_object(*one) for one in found], more=more))

    @routes.get(_ONE, summary="One of them", responses=error_responses(401, 404, 429, 503))
    async def one(webhook_endpoint_id: str, request: Request) -> JSONResponse:
        tenant = state.keys.caller(request)
        return JSONResponse(
            endpoint_object(*await store.run(lambda: context.get(tenant, webhook_endpoint_id), tenant=tenant))
        )

    @routes.post(
        _ONE,
        summary="Change its URL, events or name; enable or disable it",
        responses=error_responses(400, 401, 404, 413, 429, 503, 507),
        openapi_extra=_takes(EndpointChange),
    )
    async def change(webhook_endpoint_id: str, request: Request) -> JSONResponse:
        tenant = state.keys.caller(request)
        asked, now_s = read_endpoint_change(await page_body(request), rules), time.time()
        found = await store.run(lambda: context.change(tenant, webhook_endpoint_id, asked, now_s), tenant=tenant)
        return JSONResponse(endpoint_object(*found))

    @routes.delete(_ONE, summary="Send nothing more, and forget it", responses=error_responses(401, 404, 429, 503))
    async def delete(webhook_endpoint_id: str, request: Request) -> JSONResponse:
        tenant = state.keys.caller(request)
        await store.run(lambda: context.delete(tenant, webhook_endpoint_id), tenant=tenant)
        return JSONResponse({"id": webhook_endpoint_id, "object": "webhook_endpoint.deleted", "deleted": True})

    @routes.post(
        _ONE + "/rotate_secret",
        summary="Sign with a new secret, and for a while with the old one too",
        responses=error_responses(400, 401, 404, 409, 413, 422, 429, 503, 507),
        openapi_extra=_takes(SecretRotation),
    )
    async def rotate(webhook_endpoint_id: str, request: Request) -> Response:
        tenant = state.keys.caller(request)
        keep_s, sent, now_s = read_rotation(await page_body(request)), read_sent(request), time.time()
        try:
            endpoint, keys, claim = await store.run(
                lambda: context.rotate(tenant, webhook_endpoint_id, keep_s, sent, now_s), tenant=tenant
            )
        except Conflict as error:
            return _final(error)
        return await idempotency.answer(request, claim, endpoint_object(endpoint, keys, shown=True), store.later)

    @routes.post(
        _ONE + "/test",
        summary="Send a sample event now, once",
        responses=error_responses(400, 401, 404, 409, 413, 422, 429, 503, 507),
        openapi_extra=_takes(EndpointTest),
    )
    async def test(webhook_endpoint_id: str, request: Request) -> Response:
        tenant = state.keys.caller(request)
        event_type, sent, now_s = read_test(await page_body(request)), read_sent(request), time.time()
        if tests[tenant] >= _MAX_TESTS:
            raise OverCapacity(f"{_MAX_TESTS} tests of yours run now: wait for one", retry_after_s=1)
        tests[tenant] += 1
        try:
            key = await store.run(
                lambda: context.ask_test(tenant, webhook_endpoint_id, event_type, sent, now_s), tenant=tenant
            )
            status = await _tested(state, key)
        except Conflict as error:
            return _final(error)
        finally:
            tests[tenant] -= 1
            if not tests[tenant]:
                del tests[tenant]
        found = {"object": "webhook_endpoint.test", "webhook_endpoint_id": webhook_endpoint_id}
        return JSONResponse(found | {"event_type": event_type, "success": True, "status_code": status})

    @routes.get(
        _ONE + "/deliveries",
        summary="What was sent to it and what it answered, newest first",
        responses=error_responses(400, 401, 404, 429, 503),
    )
    async def deliveries(
        webhook_endpoint_id: str,
        request: Request,
        after: str = Query("", max_length=80),
        limit: int = Query(20, ge=1, le=100),
    ) -> JSONResponse:
        tenant = state.keys.caller(request)
        found, more = await store.read_page(
            tenant, lambda: context.deliveries(tenant, webhook_endpoint_id, after, limit)
        )
        return JSONResponse(list_object([delivery_object(one) for one in found], more=more))

    @routes.get("/v1/webhook_event_types", summary="What can be heard of", responses=error_responses(401))
    async def event_types(request: Request) -> JSONResponse:
        state.keys.caller(request)
        return JSONResponse({"object": "list", "data": list(EVENT_TYPES)})

    return routes


async def _tested(state: RouterState, key: DeliveryKey) -> int:
    """The status that a sample was answered with. Raises ``BadRequest`` if nothing answered, ``NoNotifier`` if nobody
    sent it in time; then nobody will. Another process writes it down: there is nothing to wait for but time."""
    deliveries = state.store.deliveries
    try:
        async with asyncio.timeout(_TEST_LIMIT_S):
            while not (found := await state.store.run(lambda: deliveries.state(key))).settled:  # noqa: ASYNC110
                await asyncio.sleep(_TEST_EVERY_S)
    except TimeoutError:
        await state.store.run(lambda: deliveries.delete(key))
        raise NoNotifier(
            f"nothing sent the test within {_TEST_LIMIT_S:g} s: is an `inferq notifier` running, with this file store?",
            retry_after_s=5,
        ) from None
    attempt = found.attempts[-1]
    if attempt.status is None:
        raise BadRequest(f"the endpoint did not answer the test: {attempt.error}", param="url")
    return attempt.status


def _takes(message: type[BaseModel]) -> dict[str, object]:
    schema = message.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _final(error: Conflict) -> Response:
    """The SDK takes every 409 for a lock that will be free soon, and asks again."""
    refused = error_response(error)
    refused.headers["x-should-retry"] = "false"
    return refused
