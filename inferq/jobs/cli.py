"""``inferq jobs``: the options of its commands. Their work is in :mod:`inferq.commands`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..commands.options import DEFAULT_URL, ApiKey, AsJson, RouterUrl
from ..exit_codes import run_for_code

if TYPE_CHECKING:
    from .client import JobsClient

jobs_app = typer.Typer(
    help="Requests of the background (header X-Inferq-Background: true). Exit codes for scripts: 0 done, 1 it ended "
    "with trouble, 2 it could not be asked, 3 it has not ended yet."
)

JobName = Annotated[str, typer.Argument(metavar="ID", help="The job's id, as `inferq jobs list` shows it.")]


@jobs_app.command("list")
def jobs_list(
    limit: Annotated[int, typer.Option(min=1, help="Show no more than the newest so many.")] = 20,
    status: Annotated[
        str, typer.Option(help="Only those that are queued, in_progress, completed, failed, cancelled or expired.")
    ] = "",
    router_url: RouterUrl = DEFAULT_URL,
    api_key: ApiKey = "",
    as_json: AsJson = False,
) -> None:
    """Your background jobs, newest first."""
    from .views import list_jobs  # noqa: PLC0415

    client = _client(router_url, api_key)
    run_for_code(lambda: list_jobs(client, limit=limit, status=status, as_json=as_json))


@jobs_app.command("show")
def jobs_show(
    job_id: JobName,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Stay until it has ended; Ctrl-C leaves it be.")] = False,
    router_url: RouterUrl = DEFAULT_URL,
    api_key: ApiKey = "",
    as_json: AsJson = False,
) -> None:
    """How a job stands, and its answer on standard output."""
    from .views import show_job  # noqa: PLC0415

    client = _client(router_url, api_key)
    run_for_code(lambda: show_job(client, job_id, wait=wait, as_json=as_json))


@jobs_app.command("cancel")
def jobs_cancel(
    job_id: JobName, router_url: RouterUrl = DEFAULT_URL, api_key: ApiKey = "", as_json: AsJson = False
) -> None:
    """End a job. One that has ended stays as it is."""
    from .views import cancel_job  # noqa: PLC0415

    client = _client(router_url, api_key)
    run_for_code(lambda: cancel_job(client, job_id, as_json=as_json))


def _client(router_url: str, api_key: str) -> JobsClient:
    from .client import JobsClient  # noqa: PLC0415

    return JobsClient(router_url, api_key=api_key)
