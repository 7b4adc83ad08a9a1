"""Commands whose exit code says how something stands."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable

import typer


def run_for_code(work: Callable[[], Awaitable[int]]) -> None:
    """Run ``work`` and end with the code that it answers; with 2 where it could not be done."""
    from telemetry.server import run_process  # noqa: PLC0415

    code = 0

    async def keep_code() -> None:
        nonlocal code
        code = await work()

    try:
        raise typer.Exit(run_process(keep_code) or code)
    except BrokenPipeError:
        # Whoever read our output has enough of it. Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
