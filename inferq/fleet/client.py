"""Pools, workers and dead letters, as a Router reports them."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from queue_schemas import (
    FABRIC_PREFIX,
    DeadLetterIds,
    DeadLetterList,
    DeadRequest,
    PoolDepth,
    PoolList,
    RemovedCount,
    WorkerList,
)
from queue_schemas.fleet.messages import AutoscalerAnswer, AutoscalerClaim

from ..client import RouterClient, checked, parse


class FleetClient(RouterClient):
    """All methods raise :class:`RequestFailed`."""

    async def pools(self) -> list[PoolDepth]:
        return parse(PoolList, await self.call("GET", f"{FABRIC_PREFIX}/pools")).pools

    async def workers(self) -> WorkerList:
        return parse(WorkerList, await self.call("GET", f"{FABRIC_PREFIX}/workers"))

    async def pool(self, model: str) -> PoolDepth:
        return parse(PoolDepth, await self.call("GET", f"{FABRIC_PREFIX}/pools/{quote(model)}"))

    async def drain(self, worker_id: str) -> None:
        """Let a worker finish what it runs, then end."""
        await self.call("POST", f"{FABRIC_PREFIX}/workers/{quote(worker_id)}/drain")

    async def claim_pool(self, claim: AutoscalerClaim) -> bool:
        """Act as the autoscaler of a pool; whether we do."""
        body = await self.send_json(f"{FABRIC_PREFIX}/autoscalers", claim.model_dump())
        return parse(AutoscalerAnswer, body).acting

    async def dead_letters(self, after: str, limit: int) -> DeadLetterList:
        """A page of the dead letters, oldest first."""
        return parse(DeadLetterList, await self.call("GET", f"{FABRIC_PREFIX}/dead?after={after}&limit={limit}"))

    async def dead_request(self, letter_id: str) -> DeadRequest:
        return parse(DeadRequest, await self.call("GET", f"{FABRIC_PREFIX}/dead/{quote(letter_id, safe=':')}"))

    async def purge_dead(self, letter_ids: Sequence[str]) -> int:
        """Remove dead letters; how many existed."""
        body = DeadLetterIds(ids=list(letter_ids)).model_dump_json().encode()
        headers = {"content-type": "application/json"}
        return parse(
            RemovedCount, await self.call("POST", f"{FABRIC_PREFIX}/dead/purge", data=body, headers=headers)
        ).removed

    async def replay(self, path: str, body: bytes, content_type: str) -> bytes:
        """Send a request byte for byte; its answer."""
        async with self.send_inference(path, body, content_type) as answer:
            return await checked(answer)
