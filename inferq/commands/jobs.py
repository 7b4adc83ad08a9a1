"""``inferq jobs``: background requests, to look at, to wait for, to cancel."""

from __future__ import annotations

import asyncio
import time

import orjson
from rich.table import Table
from rich.text import Text

from inferq.console import err, out, print_json, visible
from inferq.jobs_client import JobsClient, JobView

from .batch_watch import EXIT_RUNNING, EXIT_TROUBLE, duration

PAGE = 100
_SHORTEST_LOOK_S, _LONGEST_LOOK_S = 0.2, 3.0
_CLOCK = "%Y-%m-%d %H:%M:%S"


async def list_jobs(client: JobsClient, *, limit: int, status: str, as_json: bool) -> int:
    """The newest of them."""
    found: list[JobView] = []
    async with client:
        after, more = "", True
        while more and len(found) < limit:
            page = await client.jobs(after, min(PAGE, limit - len(found)), status)
            found += page.data
            after, more = page.last_id or "", page.has_more
    if as_json:
        print_json([job.model_dump(mode="json") for job in found])
    elif found:
        out.print(_table(found))
    else:
        out.print("There are no such jobs: requests with the header X-Inferq-Background: true make them.")
    return 0


async def show_job(client: JobsClient, job_id: str, *, wait: bool, as_json: bool) -> int:
    """One of them, with its answer; with ``wait`` once it has ended. The exit code says how it stands."""
    async with client:
        job = await client.job(job_id)
        pause_s = _SHORTEST_LOOK_S
        while wait and not job.ended:
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.3, _LONGEST_LOOK_S)
            job = await client.job(job_id)
    if as_json:
        print_json(job.model_dump(mode="json"))
    else:
        _print(job)
    return _exit_code(job)


async def cancel_job(client: JobsClient, job_id: str, *, as_json: bool) -> int:
    """End one of them. One that has ended stays as it is, which is no trouble."""
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
    """What it is on standard error, its answer on standard output."""
    err.print(visible(_summary(job)), markup=False, emoji=False)
    if job.error is not None:
        err.print(visible(f"{job.error.message} ({job.error.code})"), style="red", markup=False, emoji=False)
    response = job.response
    if response is None:
        return
    if response.too_large:
        err.print(f"Its answer is too large to be shown: GET /v1/jobs/{job.id}/output", markup=False)
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


def _table(jobs: list[JobView]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    # Whole, however narrow the terminal is: it is there to be copied.
    table.add_column("ID", min_width=34, no_wrap=True)
    for name in ("STATUS", "CREATED", "TOOK", "ATTEMPTS", "MODEL", "PATH"):
        table.add_column(name, justify="right" if name in {"TOOK", "ATTEMPTS"} else "left")
    for job in jobs:
        created = time.strftime(_CLOCK, time.localtime(job.created_at))
        took = duration(job.ended_at - job.created_at) if job.ended_at is not None else "-"
        style = {"failed": "red", "expired": "red", "cancelled": "yellow"}.get(job.status, "")
        names = (Text(visible(job.model)), Text(visible(job.path or "-")))
        table.add_row(job.id, job.status, created, took, str(job.attempts), *names, style=style)
    return table
