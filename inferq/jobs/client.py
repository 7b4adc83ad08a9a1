"""Background jobs as the commands ask a Router for them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from ..batch.client import again
from ..client import FabricClient, FabricRefused

_JOBS = "/v1/jobs"


class JobError(BaseModel):
    message: str
    code: str | None = None


class JobResponse(BaseModel):
    """An answer: ``body`` as ``encoding`` says (json, text, base64), None if it is ``too_large`` to be shown."""

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


class JobPage(BaseModel):
    data: list[JobView]
    last_id: str | None = None
    has_more: bool = False


class JobsClient(FabricClient):
    """All methods raise :class:`FabricRefused`."""

    async def job(self, job_id: str) -> JobView:
        """One, with its answer once it has ended."""
        return await again(lambda: self._view("GET", f"{_JOBS}/{_named(job_id)}"))

    async def jobs(self, after: str, limit: int, status: str) -> JobPage:
        """A page of them, newest first."""
        query = f"?limit={limit}" + (f"&after={_named(after)}" if after else "")
        query += f"&status={_named(status)}" if status else ""

        async def attempt() -> JobPage:
            return self.parsed(JobPage, await self.call("GET", _JOBS + query))

        return await again(attempt)

    async def cancel(self, job_id: str) -> JobView:
        """End one, unless it has ended."""
        return await again(lambda: self._view("POST", f"{_JOBS}/{_named(job_id)}/cancel"))

    async def _view(self, method: str, path: str) -> JobView:
        return self.parsed(JobView, await self.call(method, path))


def _named(word: str) -> str:
    """Only what can be an id, or a status, becomes part of a path."""
    if not word.replace("_", "").replace("-", "").isalnum() or not word.isascii():
        raise FabricRefused(f"{word[:80]!r} is not the id of a job: `inferq jobs list` shows them", answered=404)
    return word
