"""The pages of persisted jobs, under /v1/jobs: any job of a tenant, from any Router, until it is forgotten."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from broker import MAX_PAGE_JOBS
from openai_api.pages import Page, page_of
from queue_schemas import PERSISTED_STATES, BadRequest, InferqError, JobNotFound, PersistedJob
from telemetry import get_logger
from telemetry.http.access import Access
from telemetry.http.error_answers import ErrorDetail, error_responses

from ..http.access import Gate
from .event_ids import LAST_EVENT_HEADER, Position, read_position
from .output_streamer import OutputStreamer, PersistedResponse
from .schemas import job_object, response_object, states_of
from .service import JOBS_PATH, PersistedJobs, not_found

MAX_SHOWN_BYTES = 4 << 20
"""Largest answer that is shown in a job's object; larger ones are read at /output."""
_ONE = JOBS_PATH + "/{job_id}"
_FOUND = (401, 404, 503)
_Responses = dict[int | str, dict[str, Any]]
_GIVEN: _Responses = {
    "default": {"description": "The answer as its request would have got it: the engine's status and content type"}
}
_EVENTS: _Responses = {200: {"content": {"text/event-stream": {}}}}

log = get_logger(__name__)

JobStatus = Literal["queued", "in_progress", "completed", "failed", "cancelled", "expired"]


class JobResponse(BaseModel):
    """The answer of a job: JSON as it is, text (a stream's, too) as text, all else in base64."""

    status_code: int
    content_type: str
    headers: dict[str, str] = Field(description="Those of the engine's that its client was to see")
    body: Any = Field(description="Null if it is too large to be shown here: read it at /output")
    encoding: Literal["json", "text", "base64"] | None
    too_large: bool


class JobObject(BaseModel):
    """A job. Times in seconds since 1970, null where there is none yet."""

    id: str
    object: Literal["job"]
    status: JobStatus
    model: str
    path: str | None
    stream: bool
    request_id: str | None
    attempts: int = Field(description="How often it was started")
    created_at: int
    started_at: int | None
    ended_at: int | None
    deadline_at: int = Field(description="When it expires unless it has ended")
    expires_at: int | None = Field(description="When it is forgotten, with its answer")
    error: ErrorDetail | None = Field(description="Why it has no answer")
    response: JobResponse | None = Field(description="Its answer, once it has ended; never in a list")


class JobDeleted(BaseModel):
    """All that was kept of a job is forgotten."""

    id: str
    object: Literal["job"]
    deleted: bool


def job_routes(gate: Gate, jobs: PersistedJobs, streamer: OutputStreamer) -> APIRouter:  # noqa: C901 - one function per route
    """The paths below ``/v1/jobs``."""
    routes = APIRouter(tags=["jobs"], dependencies=[gate.allow(Access.CLIENT)])

    async def found(request: Request, job_id: str) -> PersistedJob:
        kept = await jobs.status(gate.tenant_of(request), job_id)
        if kept is None:
            raise not_found(job_id)
        return kept

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
        status: Annotated[JobStatus | None, Query(description="Only those that are so now")] = None,
    ) -> JSONResponse:
        states = states_of(status) if status else []
        found, more = await jobs.jobs(gate.tenant_of(request), after=after, limit=limit, states=states)
        # With a filter a page may have fewer jobs than its limit: one call examines a limited number of jobs.
        return JSONResponse(page_of([job_object(kept) for kept in found], has_more=bool(more), last_id=more or None))

    @routes.get(
        _ONE, summary="A job, with its answer once it has ended", response_model=JobObject,
        responses=error_responses(*_FOUND, 429),
    )  # fmt: skip
    async def job(request: Request, job_id: str) -> JSONResponse:
        kept = await found(request, job_id)
        if kept.state not in PERSISTED_STATES:
            return JSONResponse(job_object(kept))
        try:
            return JSONResponse(job_object(kept, await _answer(jobs, kept)))
        except JobNotFound:
            raise not_found(job_id) from None

    @routes.get(
        _ONE + "/output",
        summary="The answer of a job as its request would have got it, from its beginning, and as it comes",
        response_class=Response,
        responses=error_responses(*_FOUND, 429) | _GIVEN,
    )
    async def output(request: Request, job_id: str) -> Response:
        return PersistedResponse(streamer, await found(request, job_id))

    @routes.get(
        _ONE + "/events",
        summary="The same as server-sent events with ids, behind the one that the client has",
        response_class=Response,
        responses=error_responses(400, *_FOUND, 429) | _EVENTS | _GIVEN,
    )
    async def events(
        request: Request,
        job_id: str,
        starting_after: str = Query(
            "", max_length=100, description="Id or number of the last event that the client has"
        ),
    ) -> Response:
        after = _after(request.headers.get(LAST_EVENT_HEADER, ""), starting_after, job_id)
        return PersistedResponse(streamer, await found(request, job_id), events=True, after=after)

    @routes.post(
        _ONE + "/cancel",
        summary="End a job; one that has ended stays as it is",
        response_model=JobObject,
        responses=error_responses(*_FOUND),
    )
    async def cancel(request: Request, job_id: str) -> JSONResponse:
        kept = await jobs.cancel(gate.tenant_of(request), job_id)
        if kept is None:
            raise not_found(job_id)
        return JSONResponse(job_object(kept))

    @routes.delete(
        _ONE,
        summary="Forget a job and its answer; one that has not ended is cancelled",
        response_model=JobDeleted,
        responses=error_responses(*_FOUND),
    )
    async def delete(request: Request, job_id: str) -> JSONResponse:
        if not await jobs.delete(gate.tenant_of(request), job_id):
            raise not_found(job_id)
        return JSONResponse({"id": job_id, "object": "job", "deleted": True})

    return routes


async def _answer(jobs: PersistedJobs, kept: PersistedJob) -> dict[str, Any] | None:
    """The answer of a job that has one; None if it cannot be put together any more."""
    pieces, size = [], 0
    async with jobs.follow(kept.tenant, kept.id) as followed:
        try:
            async for piece in followed:
                size += len(piece)
                if size > MAX_SHOWN_BYTES:
                    break
                pieces.append(piece)
        except JobNotFound:
            raise
        except InferqError as error:
            log.info("answer_not_shown", job_id=kept.id, code=error.code, error=error.message)
        if followed.head is None:
            return None
        return response_object(followed.head, b"".join(pieces) if size <= MAX_SHOWN_BYTES else None)


def _after(header: str, query: str, job_id: str) -> Position | None:
    """The last event that the client has: by its header, or else by its query."""
    if header:
        after = read_position(header, LAST_EVENT_HEADER)
    elif query:
        after = read_position(query, "starting_after")
    else:
        return None
    if after.job_id not in (None, job_id):
        raise BadRequest(f"{LAST_EVENT_HEADER} names an event of the job {after.job_id}", param=LAST_EVENT_HEADER)
    return after
