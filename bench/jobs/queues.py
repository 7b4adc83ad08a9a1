"""Other job queues on a server of their own each, of the same kind as inferq's: submit and drain of the same jobs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from broker.embedded.server import EmbeddedServer

from .. import peers
from ..processes import foreign_cores, new_folder, running_program, snapshot
from ..windows import cpu_us_by_name
from .dialogue import submitter
from .inferq import JobStats

QUEUES = {"FastStream": "faststream_jobs", "taskiq": "taskiq_jobs", "arq": "arq_jobs", "RQ": "rq_jobs"}
"""By name: the script in ``bench/peers`` that is its worker and its submitter."""
ENVIRONMENTS = {"arq": "arq"}
"""Those with requirements of their own: arq takes no redis-py that FastStream takes."""


async def measured_queue(name: str, folder: Path, jobs: int, number: int = 0) -> JobStats:
    """Submit ``jobs`` jobs that do nothing while the worker sleeps, wake it, and wait until the last one ran.

    Raises ``peers.NotInstalled`` where the peers are not to be had, ``SubmitterFailed`` if it does not work.
    """
    python, script = peers.python(ENVIRONMENTS.get(name, "")), Path(peers.__file__).with_name(f"{QUEUES[name]}.py")
    new_folder(folder)
    async with EmbeddedServer(folder / "valkey") as server:
        command: list[str | Path] = [python, script, "worker", server.url, str(jobs)]
        async with (
            running_program(command, folder / "worker.log", env=peers.environment()) as worker_pid,
            submitter(
                [python, script, "submit", server.url, str(jobs)], folder / "submitter.log", env=peers.environment()
            ) as asked,
        ):
            await asked.ask()
            pids = {"worker": worker_pid, "redis": server.pid or 0}
            before = snapshot()
            os.killpg(worker_pid, signal.SIGSTOP)
            try:
                submit = await asked.ask({})
            finally:
                os.killpg(worker_pid, signal.SIGCONT)
            drain = await asked.ask({})
            after = snapshot()
    spent = cpu_us_by_name(pids, before, after, jobs)
    spent["submitter"] = (submit["cpu_s"] + drain["cpu_s"]) * 1e6 / jobs
    return JobStats(
        name=name,
        number=number,
        submit_per_s=jobs / submit["seconds"],
        drain_per_s=jobs / drain["seconds"],
        cpu_us_of=spent,
        foreign=foreign_cores(before, after),
    )
