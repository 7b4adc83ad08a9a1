"""Background jobs through a Router."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from ..client import RouterClient, parse, path_part, with_retries

_JOBS = "/v1/jobs"


class JobError(BaseModel):
    """Why a job failed, as the Router reports it."""

    message: str
    code: str | None = None


class JobResponse(BaseModel):
    """An answer: ``body`` in the ``encoding`` json, text or base64; None if it is ``too_large`` to be shown."""

    status_code: int
    content_type: str
    body: Any = None
    encoding: str | None = None
    too_large: bool = False


class JobView(BaseModel):
    """A job as the Router shows it. Times are Unix seconds."""

    model_config = ConfigDict(extra="allow")

    id: str
    status: str
    model: str
    path: str | None = None
    attempts: int = 0
    created_at: int
    started_at: int | None = None
    ended_at: int | None = None
    error: JobError | None = None
    response: JobResponse | None = None

    @property
    def ended(self) -> bool:
        return self.status in {"completed", "failed", "cancelled", "expired"}


class JobsClient(RouterClient):
    """All methods raise :class:`RequestFailed`."""

    async def job(self, job_id: str) -> JobView:
        """One job, with its answer once it has ended."""
        return parse(JobView, await self.get(f"{_JOBS}/{_id(job_id)}"))

    async def jobs(self, limit: int, status: str) -> list[JobView]:
        """The newest ``limit`` jobs; with ``status`` only those."""
        query = {"status": status} if status else None
        return await with_retries(lambda: self.get_all(_JOBS, JobView, limit, query=query))

    async def cancel(self, job_id: str) -> JobView:
        """Cancel a job, unless it has ended."""
        path = f"{_JOBS}/{_id(job_id)}/cancel"
        return parse(JobView, await with_retries(lambda: self.call("POST", path)))


def _id(job_id: str) -> str:
    return path_part(job_id, "a job", "inferq jobs list")
