"""``inferq jobs``: the options of its commands. Their work is in :mod:`inferq.jobs.views`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..exit_codes import run_for_code
from ..option_blocks import with_blocks
from ..options import AsJson, NewestLimit, RouterOptions

jobs_app = typer.Typer(
    help="Background jobs: requests with X-Inferq-Background: true.\n\nExit codes: 0 success, 1 the job ended with an "
    "error, 2 the command failed, 3 the job has not ended yet."
)

JobName = Annotated[str, typer.Argument(metavar="ID", help="Id of the job, from `inferq jobs list`.")]


@jobs_app.command("list")
@with_blocks
def jobs_list(
    router: RouterOptions,
    limit: NewestLimit = 20,
    status: Annotated[
        str, typer.Option(help="Show only jobs that are queued, in_progress, completed, failed, cancelled or expired.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """List your background jobs, newest first."""
    from .client import JobsClient  # noqa: PLC0415
    from .views import list_jobs  # noqa: PLC0415

    client = router.client(JobsClient)
    run_for_code(lambda: list_jobs(client, limit=limit, status=status, as_json=as_json))


@jobs_app.command("show")
@with_blocks
def jobs_show(
    router: RouterOptions,
    job_id: JobName,
    wait: Annotated[
        bool, typer.Option("--wait", "-w", help="Wait until it has ended. Ctrl-C leaves it running.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show a job, and its answer on standard output."""
    from .client import JobsClient  # noqa: PLC0415
    from .views import show_job  # noqa: PLC0415

    client = router.client(JobsClient)
    run_for_code(lambda: show_job(client, job_id, wait=wait, as_json=as_json))


@jobs_app.command("cancel")
@with_blocks
def jobs_cancel(router: RouterOptions, job_id: JobName, as_json: AsJson = False) -> None:
    """Cancel a job. An ended job does not change."""
    from .client import JobsClient  # noqa: PLC0415
    from .views import cancel_job  # noqa: PLC0415

    client = router.client(JobsClient)
    run_for_code(lambda: cancel_job(client, job_id, as_json=as_json))
