"""``/v1/jobs``: lists, shows, streams, cancels and deletes the persisted jobs of a tenant, from any Router."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from broker import MAX_PAGE_JOBS
from openai_api.pages import Page, page_of
from queue_schemas import PERSISTED_STATES, BadRequest, JobNotFound, PersistedJob
from telemetry.http.access import Access
from telemetry.http.error_answers import error_responses

from ..http.access import Gate
from .event_ids import LAST_EVENT_HEADER, Position, read_position
from .output_streamer import OutputStreamer, PersistedResponse
from .schemas import JobDeleted, JobObject, JobStatus, job_object, states_of
from .service import JOBS_PATH, JobService, not_found

_ONE = JOBS_PATH + "/{job_id}"
_FOUND = (401, 404, 503)
_Responses = dict[int | str, dict[str, Any]]
_OUTPUT: _Responses = {
    "default": {"description": "The answer as its request would have got it: the engine's status and content type"}
}
_EVENTS: _Responses = {200: {"content": {"text/event-stream": {}}}}


def job_routes(jobs: JobService, streamer: OutputStreamer, gate: Gate) -> APIRouter:  # noqa: C901 - one function per route
    """The routes of one Router."""
    routes = APIRouter(tags=["jobs"], dependencies=[gate.allow(Access.CLIENT)])

    async def find(request: Request, job_id: str) -> PersistedJob:
        found = await jobs.get(gate.tenant_of(request), job_id)
        if found is None:
            raise not_found(job_id)
        return found

    @routes.get(
        JOBS_PATH,
        summary="Background jobs, newest first",
        response_model=Page[JobObject],
        responses=error_responses(400, 401, 503),
    )
    async def page(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE_JOBS)] = 20,
        after: Annotated[str, Query(max_length=60, description="The last id of the page before")] = "",
        status: Annotated[JobStatus | None, Query(description="Only those with this status now")] = None,
    ) -> JSONResponse:
        states = states_of(status) if status else []
        found, next_id = await jobs.page(gate.tenant_of(request), after=after, limit=limit, states=states)
        # With a filter a page may end before its limit: one call reads a bounded number of jobs.
        return JSONResponse(
            page_of([job_object(job) for job in found], has_more=bool(next_id), last_id=next_id or None)
        )

    @routes.get(
        _ONE,
        summary="A job, with its answer once it has ended",
        response_model=JobObject,
        responses=error_responses(*_FOUND, 429),
    )
    async def get(request: Request, job_id: str) -> JSONResponse:
        job = await find(request, job_id)
        if job.state not in PERSISTED_STATES:
            return JSONResponse(job_object(job, place=await jobs.place(job)))
        try:
            return JSONResponse(job_object(job, await jobs.answer(job)))
        except JobNotFound:
            raise not_found(job_id) from None

    @routes.get(
        _ONE + "/output",
        summary="The answer of a job as its request would have got it, from its beginning, and as it comes",
        response_class=Response,
        responses=error_responses(*_FOUND, 429) | _OUTPUT,
    )
    async def output(request: Request, job_id: str) -> Response:
        return PersistedResponse(streamer, await find(request, job_id))

    @routes.get(
        _ONE + "/events",
        summary="The same as server-sent events with ids, behind the one that the client has",
        response_class=Response,
        responses=error_responses(400, *_FOUND, 429) | _EVENTS | _OUTPUT,
    )
    async def events(
        request: Request,
        job_id: str,
        starting_after: str = Query(
            "", max_length=100, description="Id or number of the last event that the client has"
        ),
    ) -> Response:
        after = _after(request.headers.get(LAST_EVENT_HEADER, ""), starting_after, job_id)
        return PersistedResponse(streamer, await find(request, job_id), events=True, after=after)

    @routes.post(
        _ONE + "/cancel",
        summary="End a job; one that has ended stays as it is",
        response_model=JobObject,
        responses=error_responses(*_FOUND),
    )
    async def cancel(request: Request, job_id: str) -> JSONResponse:
        job = await jobs.cancel(gate.tenant_of(request), job_id)
        if job is None:
            raise not_found(job_id)
        return JSONResponse(job_object(job))

    @routes.delete(
        _ONE,
        summary="Delete a job and its answer; one that has not ended is cancelled",
        response_model=JobDeleted,
        responses=error_responses(*_FOUND),
    )
    async def delete(request: Request, job_id: str) -> JSONResponse:
        if not await jobs.delete(gate.tenant_of(request), job_id):
            raise not_found(job_id)
        return JSONResponse({"id": job_id, "object": "job", "deleted": True})

    return routes


def _after(header: str, query: str, job_id: str) -> Position | None:
    """The last event that the client has: named by its header, or else by its query."""
    if header:
        after = read_position(header, LAST_EVENT_HEADER)
    elif query:
        after = read_position(query, "starting_after")
    else:
        return None
    if after.job_id not in (None, job_id):
        raise BadRequest(f"{LAST_EVENT_HEADER} names an event of the job {after.job_id}", param=LAST_EVENT_HEADER)
    return after
