"""Commands whose exit code says how something stands."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import typer


def run_for_code(work: Callable[[], Awaitable[int]]) -> None:
    """Run ``work`` and end with the code that it answers; with 2 where it could not be done."""
    from telemetry.http.server import run_process  # noqa: PLC0415

    code = 0

    async def keep_code() -> None:
        nonlocal code
        code = await work()

    raise typer.Exit(run_process(keep_code) or code)
