"""What RQ's jobs run. They carry names alone; what they work with is the process's."""

from __future__ import annotations

import asyncio
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

from queue_schemas import CannotStart, Tenant

from .batcher import STEP_LIMIT_S, Batcher


@dataclass(frozen=True, slots=True)
class _Process:
    batcher: Batcher
    loop: asyncio.AbstractEventLoop


_process: list[_Process] = []


def serve_steps(batcher: Batcher | None) -> None:
    """From now on the jobs of this process run on ``batcher``, in the event loop that calls this; None: on none."""
    _process[:] = [] if batcher is None else [_Process(batcher, asyncio.get_running_loop())]


def advance(tenant: str, batch_id: str) -> str:
    """One step of a batch. Blocks; for RQ's worker within `inferq batcher`."""
    if not _process:
        raise CannotStart(
            "steps of batches are run by `inferq batcher` (python -m batches.service), not by `rq worker`"
        )
    process = _process[0]
    step = asyncio.run_coroutine_threadsafe(process.batcher.advance(Tenant(tenant), batch_id), process.loop)
    try:
        return step.result(STEP_LIMIT_S + 30)
    except FutureTimeoutError:
        step.cancel()
        raise
