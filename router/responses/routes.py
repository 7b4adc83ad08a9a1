"""``/v1/responses/...``: retrieves, streams, cancels and deletes background responses, from any Router."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from openai_api.pages import Page, page_of
from openai_api.paths import RESPONSES_PATH
from queue_schemas import BadRequest
from telemetry.http.access import Access
from telemetry.http.error_answers import error_responses

from ..http.access import Gate
from ..jobs.output_streamer import OutputStreamer, PersistedResponse
from .schemas import ResponseDeleted, ResponseObject
from .service import ResponseService

_ONE = RESPONSES_PATH + "/{response_id}"
_FOUND = (401, 404, 503)


def response_routes(responses: ResponseService, streamer: OutputStreamer, gate: Gate) -> APIRouter:
    """The routes of one Router. ``POST /v1/responses`` is one of the inference paths."""
    routes = APIRouter(tags=["responses"], dependencies=[gate.allow(Access.CLIENT)])

    @routes.get(
        _ONE,
        summary="A background response as it is now; or its events behind one of them, then as they come",
        response_model=ResponseObject,
        responses=error_responses(400, *_FOUND, 429) | {200: {"content": {"text/event-stream": {}}}},
    )
    async def retrieve(
        request: Request,
        response_id: str,
        stream: bool = Query(False, description="Its events instead of its object"),
        starting_after: int | None = Query(None, ge=0, description="Number of the last event that the client has"),
    ) -> Response:
        tenant = gate.tenant_of(request)
        if not stream:
            if starting_after is not None:
                raise BadRequest("starting_after is of streams: send stream=true, too", param="starting_after")
            return JSONResponse(await responses.retrieve(tenant, response_id))
        job = await responses.find(tenant, response_id)
        after = -1 if starting_after is None else starting_after
        return PersistedResponse(streamer, job, merger=responses.events(job, after))

    @routes.post(
        _ONE + "/cancel",
        summary="End a background response; one that has ended stays as it is",
        response_model=ResponseObject,
        responses=error_responses(*_FOUND),
    )
    async def cancel(request: Request, response_id: str) -> JSONResponse:
        return JSONResponse(await responses.cancel(gate.tenant_of(request), response_id))

    @routes.delete(
        _ONE,
        summary="Forget a background response; one that has not ended is cancelled",
        response_model=ResponseDeleted,
        responses=error_responses(*_FOUND),
    )
    async def delete(request: Request, response_id: str) -> JSONResponse:
        await responses.delete(gate.tenant_of(request), response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    @routes.get(
        _ONE + "/input_items",
        summary="The items of its input",
        response_model=Page[dict[str, Any]],
        responses=error_responses(400, *_FOUND),
    )
    async def input_items(
        request: Request,
        response_id: str,
        limit: int = Query(20, ge=1, le=100),
        order: Literal["asc", "desc"] = "desc",
        after: str = Query("", max_length=200, description="The last id of the page before"),
    ) -> JSONResponse:
        items = await responses.input_items(gate.tenant_of(request), response_id)
        if order == "desc":
            items.reverse()
        ids = [item["id"] for item in items]
        if after and after not in ids:
            raise BadRequest(f"no item {after[:60]!r} found in this response: leave out after", param="after")
        rest = items[ids.index(after) + 1 :] if after else items
        return JSONResponse(page_of(rest[:limit], has_more=len(rest) > limit))

    return routes
