"""Waiting for a condition with a limit, never for a guessed time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, overload

T = TypeVar("T")


@overload
async def eventually(
    condition: Callable[[], Awaitable[T]], what: str, *, limit_s: float = 10.0, every_s: float = 0.01
) -> T: ...


@overload
async def eventually(condition: Callable[[], T], what: str, *, limit_s: float = 10.0, every_s: float = 0.01) -> T: ...


async def eventually(
    condition: Callable[[], object], what: str, *, limit_s: float = 10.0, every_s: float = 0.01
) -> object:
    """The first truthy value of ``condition`` (plain or async); fails with ``what`` after ``limit_s``."""
    limit = time.monotonic() + limit_s
    while True:
        value = condition()
        found = await value if inspect.isawaitable(value) else value
        if found:
            return found
        if time.monotonic() > limit:
            raise AssertionError(f"not within {limit_s:g} s: {what} (last seen: {found!r})")
        await asyncio.sleep(every_s)
