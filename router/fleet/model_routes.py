"""``/v1/models``: the models that clients may name, from the Router's model directory."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from telemetry.http.access import Access
from telemetry.http.error_answers import error_responses

from ..http.access import Gate
from ..model_directory import OnNoWorker, check_model, model_list, model_object
from ..queue_link import QueueLink


def model_routes(link: QueueLink, gate: Gate, on_no_worker: OnNoWorker) -> APIRouter:
    """Lists and shows models. ``on_no_worker`` goes into the hint of a model that no worker serves now."""
    routes = APIRouter(tags=["models"], dependencies=[gate.allow(Access.CLIENT)])

    @routes.get(
        "/v1/models",
        summary="All models: served now, declared, or remembered for a day",
        responses=error_responses(401),
    )
    async def models() -> JSONResponse:
        return JSONResponse(model_list(link.directory, on_no_worker))

    @routes.get("/v1/models/{model:path}", summary="One model", responses=error_responses(401, 404))
    async def model(model: str) -> JSONResponse:
        directory = link.directory
        if model not in directory.pools:
            directory = await link.fresh_directory()
        check_model(model, directory, "queue")
        return JSONResponse(model_object(model, directory.pools[model], on_no_worker))

    return routes
