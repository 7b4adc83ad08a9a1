"""Call every shard at the same time and collect each one's answer or error, for calls that concern the whole queue."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from queue_schemas import InferqError, ShardKeys

_T = TypeVar("_T")


async def on_each(keys: Sequence[ShardKeys], call: Callable[[ShardKeys], Awaitable[_T]]) -> list[_T | InferqError]:
    """The answer of ``call`` for each shard, or its error; all are asked at the same time."""

    async def one(shard: ShardKeys) -> _T | InferqError:
        try:
            return await call(shard)
        except InferqError as error:
            return error

    return await asyncio.gather(*(one(shard) for shard in keys))


def answers_of(found: Sequence[_T | InferqError]) -> list[_T]:
    """The answers of :func:`on_each`; raises the first error, if there is one."""
    for answer in found:
        if isinstance(answer, InferqError):
            raise answer
    return [answer for answer in found if not isinstance(answer, InferqError)]
