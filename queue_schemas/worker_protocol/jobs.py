"""What a worker is given of a job: what it needs to run it, and nothing of who asked."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ..ids import JobId, Pool, Tenant
from ..job import Job
from ..lanes import Lane
from ..leases import Lease
from .fields import Count, Encoding, LeaseToken, Message, Milliseconds

NOBODY = Tenant("-")
"""The tenant of a job as workers see it that have it over HTTP."""


class LeasedJob(Message):
    """A job that the worker is to run: send ``body`` as a POST to ``path`` of its engine, and the answer back."""

    lease: LeaseToken
    job_id: str
    epoch: int = Field(ge=1, description="rises each time that an attempt ends without an answer")
    attempt_id: str
    attempt: int = Field(ge=1, description="counts from 1; max_attempts is the last")
    max_attempts: int = Field(ge=1)
    model: str
    path: str
    body: bytes = Field(description="the request as its client sent it")
    encoding: Encoding = Field(default="text", description="how body is written, in JSON")
    content_type: str = "application/json"
    headers: dict[str, str] | None = Field(
        default=None, description="request headers for the engine; null: its Router reads no headers of answers"
    )
    stream: bool = Field(description="whether the client asked for a stream of server-sent events")
    persisted: bool = Field(default=False, description="whether the answer is kept")
    lane: Lane = Lane.INTERACTIVE
    on_loss: Literal["continue", "restart", "fail"] = "restart"
    prefix: str = Field(
        default="",
        description="what earlier attempts said. An answer may go on behind it (head.continued), or start again",
    )
    yields: Count = Field(default=0, description="how often the job may still give its slot to an interactive one")
    remaining_ms: Milliseconds = Field(description="until its deadline, as of the answer that brought it")
    waited_ms: Milliseconds = 0
    predicted_ms: Milliseconds | None = None
    suspect: bool = Field(default=False, description="an engine crashed while it ran before")
    request_id: str = ""
    traceparent: str = ""
    region: str = ""
    deadline_from: str = ""
    cost_estimate: Count = 0


def leased_job(lease: Lease, token: str) -> dict[str, Any]:
    """``lease`` as a :class:`LeasedJob`, for :func:`~queue_schemas.worker_protocol.encoding.encode`. What is as usual
    is left out."""
    job = lease.job
    fields: dict[str, Any] = {
        "lease": token,
        "job_id": job.id,
        "epoch": lease.epoch,
        "attempt_id": lease.attempt_id,
        "attempt": lease.attempt,
        "max_attempts": job.max_attempts,
        "model": job.model,
        "path": job.path,
        "body": job.body,
        "content_type": job.content_type,
        "headers": None if job.headers is None else dict(job.headers),
        "stream": job.stream,
        "lane": job.lane.value,
        "on_loss": job.on_loss,
        "remaining_ms": lease.remaining_ms,
        "waited_ms": lease.waited_ms,
        "request_id": job.request_id,
        "cost_estimate": max(job.cost_estimate, 0),
    }
    if lease.predicted_ms is not None:
        fields["predicted_ms"] = lease.predicted_ms
    optional = {
        "persisted": job.persisted,
        "prefix": job.prefix,
        "yields": job.yields,
        "suspect": lease.suspect,
        "traceparent": job.traceparent,
        "region": job.region,
        "deadline_from": job.deadline_from,
    }
    return fields | {name: value for name, value in optional.items() if value}


def lease_of(given: LeasedJob) -> Lease:
    """The lease in ``given``. Its job's output goes where the token says: that is its ``reply_to``, unless it is
    persisted."""
    job = Job(
        id=JobId(given.job_id),
        tenant=NOBODY,
        model=Pool(given.model),
        path=given.path,
        body=given.body,
        content_type=given.content_type,
        lane=given.lane,
        stream=given.stream,
        persisted=given.persisted,
        max_attempts=given.max_attempts,
        on_loss=given.on_loss,
        cost_estimate=given.cost_estimate,
        reply_to=given.lease,
        traceparent=given.traceparent,
        request_id=given.request_id,
        region=given.region,
        prefix=given.prefix,
        headers=given.headers,
        deadline_from=given.deadline_from,
        yields=given.yields,
    )
    return Lease(
        job,
        given.epoch,
        given.attempt_id,
        given.attempt,
        given.remaining_ms,
        given.waited_ms,
        suspect=given.suspect,
        predicted_ms=given.predicted_ms,
    )
