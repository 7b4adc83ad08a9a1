"""What the autoscaler asks of Routers and Managers, of whichever answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self, TypeVar

from queue_schemas import PoolDepth, SessionId, WorkerInfo
from queue_schemas.fleet.messages import AutoscalerClaim

from ..client import RequestFailed
from ..fleet.client import FleetClient

_Result = TypeVar("_Result")


class Fabric:
    """``async with Fabric(urls, join_token) as fabric``. All methods raise ``RequestFailed`` if none of ``urls`` gives
    an answer."""

    def __init__(self, urls: Sequence[str], join_token: str) -> None:
        self._clients = [FleetClient(url, join_token=join_token) for url in urls]
        self._exits = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for client in self._clients:
            await self._exits.enter_async_context(client)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exits.aclose()

    async def claim(self, pool: str, autoscaler_id: SessionId, ttl_ms: int) -> bool:
        """Act for ``pool`` for ``ttl_ms``; 0 gives it up. Whether we do: another may."""
        claim = AutoscalerClaim(pool=pool, autoscaler_id=autoscaler_id, ttl_ms=ttl_ms)
        return await self._ask(lambda client: client.claim_pool(claim))

    async def pool(self, model: str) -> PoolDepth:
        """The queue of one model."""
        return await self._ask(lambda client: client.pool(model))

    async def workers(self) -> list[WorkerInfo]:
        """The fleet."""
        return (await self._ask(lambda client: client.workers())).workers

    async def drain(self, worker_id: str) -> None:
        """Let a worker finish what it runs, then end; one that is not registered is left alone."""
        try:
            await self._ask(lambda client: client.drain(worker_id))
        except RequestFailed as error:
            if error.http_status not in (404, 410):
                raise

    async def _ask(self, call: Callable[[FleetClient], Awaitable[_Result]]) -> _Result:
        """The first answer; whoever gives it is asked first from then on."""
        fault: RequestFailed | None = None
        for client in list(self._clients):
            try:
                answer = await call(client)
            except RequestFailed as error:
                if not error.transient:
                    raise
                fault = fault or error
                continue
            if self._clients[0] is not client:
                self._clients.remove(client)
                self._clients.insert(0, client)
            return answer
        raise fault or RequestFailed("there is nobody to ask: give --manager-url")
