"""``inferq jobs``: list, show, wait for and cancel background jobs."""

from __future__ import annotations

import time

import orjson

from inferq.console import err, out, print_json, visible
from inferq.invocation import pause
from inferq.jobs.client import JobsClient, JobView
from inferq.tables import Column, Row, print_table

from ..batch.watch import EXIT_RUNNING, EXIT_TROUBLE, duration

_MIN_LOOK_S, _MAX_LOOK_S = 0.2, 3.0
_CLOCK = "%Y-%m-%d %H:%M:%S"


async def list_jobs(client: JobsClient, *, limit: int, status: str, as_json: bool) -> int:
    """Print the newest jobs; the exit code."""
    async with client:
        found = await client.jobs(limit, status)
    if as_json:
        print_json([job.model_dump(mode="json") for job in found])
    elif found:
        print_table(_COLUMNS, [_row(job) for job in found])
    else:
        out.print("No such jobs. Create one with a request that has the header X-Inferq-Background: true.")
    return 0


async def show_job(client: JobsClient, job_id: str, *, wait: bool, as_json: bool) -> int:
    """Print one job with its answer, with ``wait`` once it has ended; the exit code."""
    async with client:
        job = await client.job(job_id)
        pause_s = _MIN_LOOK_S
        while wait and not job.ended:
            await pause(pause_s)
            pause_s = min(pause_s * 1.3, _MAX_LOOK_S)
            job = await client.job(job_id)
    if as_json:
        print_json(job.model_dump(mode="json"))
    else:
        _print(job)
    return _exit_code(job)


async def cancel_job(client: JobsClient, job_id: str, *, as_json: bool) -> int:
    """Cancel a job; the exit code, 0 also if it had ended."""
    async with client:
        job = await client.cancel(job_id)
    if as_json:
        print_json(job.model_dump(mode="json"))
    else:
        out.print(visible(_summary(job)), markup=False)
    return 0


def _exit_code(job: JobView) -> int:
    if not job.ended:
        return EXIT_RUNNING
    return 0 if job.status == "completed" else EXIT_TROUBLE


def _print(job: JobView) -> None:
    """Print its state to standard error and its answer to standard output."""
    err.print(visible(_summary(job)), markup=False, emoji=False)
    if job.error is not None:
        err.print(visible(f"{job.error.message} ({job.error.code})"), style="red", markup=False, emoji=False)
    response = job.response
    if response is None:
        return
    if response.too_large:
        err.print(f"Its answer is too large to show: GET /v1/jobs/{job.id}/output", markup=False)
    elif response.encoding == "text":
        out.print(visible(str(response.body)), markup=False, emoji=False)
    elif response.encoding == "json":
        out.print(visible(orjson.dumps(response.body, option=orjson.OPT_INDENT_2).decode()), markup=False, emoji=False)
    else:
        err.print(f"Its answer is {visible(response.content_type)}: GET /v1/jobs/{job.id}/output", markup=False)


def _summary(job: JobView) -> str:
    text = f"{job.id} {job.status}: {job.model} {job.path or ''}".rstrip()
    if job.ended_at is not None:
        text += f", after {duration(job.ended_at - job.created_at)}"
    return f"{text}, {job.attempts} attempts" if job.attempts > 1 else text


_COLUMNS = (
    Column("ID"),
    Column("STATUS", 1),
    Column("CREATED", 4),
    Column("TOOK", 3, right=True),
    Column("ATTEMPTS", 6, right=True),
    Column("MODEL", 2, shrinks=True),
    Column("PATH", 5),
)


def _row(job: JobView) -> Row:
    created = time.strftime(_CLOCK, time.localtime(job.created_at))
    took = duration(job.ended_at - job.created_at) if job.ended_at is not None else "-"
    style = {"failed": "red", "expired": "red", "cancelled": "yellow"}.get(job.status, "")
    return Row((job.id, job.status, created, took, str(job.attempts), job.model, job.path or "-"), style)
