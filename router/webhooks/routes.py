"""``/v1/webhook_endpoints``: creates, shows, changes and tests the URLs to which tenants have events sent."""

from __future__ import annotations

import time

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from openai_api.pages import page_of
from telemetry.http.access import Access
from telemetry.http.error_answers import error_responses
from webhooks.core.url_rules import UrlRules
from webhooks.events import EVENT_TYPES

from ..http.access import Gate
from ..http.bodies import read_request_body
from ..http.json_body import body_schema
from ..idempotency import Idempotency, read_request_key
from ..store import AsyncStore
from .endpoint_tests import EndpointTests
from .rules import read_endpoint_change, read_new_endpoint, read_rotation, read_test
from .schemas import EndpointChange, EndpointCreate, EndpointTest, SecretRotation, delivery_object, endpoint_object
from .service import WebhookService

_ALL = "/v1/webhook_endpoints"
_ONE = _ALL + "/{webhook_endpoint_id}"


def webhook_routes(
    webhooks: WebhookService,
    tests: EndpointTests,
    store: AsyncStore,
    idempotency: Idempotency,
    gate: Gate,
    rules: UrlRules,
) -> APIRouter:
    """The routes of one Router. ``store`` runs what ``webhooks`` does, which blocks. ``rules``: where URLs may lead."""
    routes = APIRouter(tags=["webhooks"], dependencies=[gate.allow(Access.CLIENT)])

    @routes.post(
        _ALL,
        summary="Have events sent to a URL; the response shows the secret, once",
        responses=error_responses(400, 401, 413, 422, 429, 503, 507),
        openapi_extra=body_schema(EndpointCreate),
    )
    async def create(request: Request) -> JSONResponse:
        tenant, key, now_s = gate.tenant_of(request), read_request_key(request), time.time()
        params = read_new_endpoint(await read_request_body(request), rules)
        endpoint, secrets, execution = await store.run(
            lambda: webhooks.create(tenant, params, key, now_s), tenant=tenant
        )
        return await idempotency.response(request, execution, endpoint_object(endpoint, secrets, show_secret=True))

    @routes.get(_ALL, summary="Your endpoints, newest first", responses=error_responses(400, 401, 429, 503))
    async def page(
        request: Request, after: str = Query("", max_length=80), limit: int = Query(20, ge=1, le=100)
    ) -> JSONResponse:
        tenant = gate.tenant_of(request)
        found, more = await store.read_page(tenant, lambda: webhooks.page(tenant, after, limit))
        return JSONResponse(page_of([endpoint_object(*one) for one in found], has_more=more))

    @routes.get(_ONE, summary="One of them", responses=error_responses(401, 404, 429, 503))
    async def one(webhook_endpoint_id: str, request: Request) -> JSONResponse:
        tenant = gate.tenant_of(request)
        found = await store.run(lambda: webhooks.get(tenant, webhook_endpoint_id), tenant=tenant)
        return JSONResponse(endpoint_object(*found))

    @routes.post(
        _ONE,
        summary="Change its URL, events or name; enable or disable it",
        responses=error_responses(400, 401, 404, 413, 429, 503, 507),
        openapi_extra=body_schema(EndpointChange),
    )
    async def change(webhook_endpoint_id: str, request: Request) -> JSONResponse:
        tenant, now_s = gate.tenant_of(request), time.time()
        params = read_endpoint_change(await read_request_body(request), rules)
        found = await store.run(lambda: webhooks.change(tenant, webhook_endpoint_id, params, now_s), tenant=tenant)
        return JSONResponse(endpoint_object(*found))

    @routes.delete(_ONE, summary="Delete it; nothing more is sent", responses=error_responses(401, 404, 429, 503))
    async def delete(webhook_endpoint_id: str, request: Request) -> JSONResponse:
        tenant = gate.tenant_of(request)
        await store.run(lambda: webhooks.delete(tenant, webhook_endpoint_id), tenant=tenant)
        return JSONResponse({"id": webhook_endpoint_id, "object": "webhook_endpoint.deleted", "deleted": True})

    @routes.post(
        _ONE + "/rotate_secret",
        summary="Sign with a new secret, and for a while with the old one too",
        responses=error_responses(400, 401, 404, 409, 413, 422, 429, 503, 507),
        openapi_extra=body_schema(SecretRotation),
    )
    async def rotate(webhook_endpoint_id: str, request: Request) -> JSONResponse:
        tenant, key, now_s = gate.tenant_of(request), read_request_key(request), time.time()
        keep_s = read_rotation(await read_request_body(request))
        endpoint, secrets, execution = await store.run(
            lambda: webhooks.rotate(tenant, webhook_endpoint_id, keep_s, key, now_s), tenant=tenant
        )
        return await idempotency.response(request, execution, endpoint_object(endpoint, secrets, show_secret=True))

    @routes.post(
        _ONE + "/test",
        summary="Send a sample event now, once",
        responses=error_responses(400, 401, 404, 409, 413, 422, 429, 503, 507),
        openapi_extra=body_schema(EndpointTest),
    )
    async def test(webhook_endpoint_id: str, request: Request) -> JSONResponse:
        tenant, key, now_s = gate.tenant_of(request), read_request_key(request), time.time()
        event_type = read_test(await read_request_body(request))
        status = await tests.run(tenant, webhook_endpoint_id, event_type, key, now_s)
        return JSONResponse(
            {
                "object": "webhook_endpoint.test",
                "webhook_endpoint_id": webhook_endpoint_id,
                "event_type": event_type,
                "success": True,
                "status_code": status,
            }
        )

    @routes.get(
        _ONE + "/deliveries",
        summary="What was sent to it and how it answered, newest first",
        responses=error_responses(400, 401, 404, 429, 503),
    )
    async def deliveries(
        webhook_endpoint_id: str,
        request: Request,
        after: str = Query("", max_length=80),
        limit: int = Query(20, ge=1, le=100),
    ) -> JSONResponse:
        tenant = gate.tenant_of(request)
        found, more = await store.read_page(
            tenant, lambda: webhooks.deliveries(tenant, webhook_endpoint_id, after, limit)
        )
        return JSONResponse(page_of([delivery_object(one) for one in found], has_more=more))

    @routes.get("/v1/webhook_event_types", summary="The types of events", responses=error_responses(401))
    async def event_types() -> JSONResponse:
        return JSONResponse({"object": "list", "data": list(EVENT_TYPES)})

    return routes
