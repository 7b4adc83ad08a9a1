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

from ..client import RouterClient, checked, parse


class FleetClient(RouterClient):
    """All methods raise :class:`RequestFailed`."""

    async def pools(self) -> list[PoolDepth]:
        return parse(PoolList, await self.call("GET", f"{FABRIC_PREFIX}/pools")).pools

    async def workers(self) -> WorkerList:
        return parse(WorkerList, await self.call("GET", f"{FABRIC_PREFIX}/workers"))

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
