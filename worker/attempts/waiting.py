"""Wait for the first of several things, or for one thing within a time limit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any


async def first(*works: Coroutine[Any, Any, object]) -> None:
    """Until one of ``works`` is done; the others are cancelled. Raises what that one raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


async def within(work: Awaitable[object], timeout_s: float) -> bool:
    """Whether ``work`` was done within the timeout; what was not is cancelled."""
    try:
        async with asyncio.timeout(timeout_s):
            await work
    except TimeoutError:
        return False
    return True
