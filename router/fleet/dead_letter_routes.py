"""``/fabric/v1/dead``: lists, shows and removes dead letters, for operators.

Dead letters hold what users sent: members of the fleet may read them, API keys may not.
"""

from __future__ import annotations

from fastapi import APIRouter, Query

from broker import MAX_DEAD_LETTERS
from queue_schemas import FABRIC_PREFIX, DeadLetterIds, DeadLetterList, DeadRequest, PathNotFound, RemovedCount
from telemetry.http.access import Access
from telemetry.http.error_answers import error_responses

from ..http.access import Gate
from ..queue_link import QueueLink

_DEAD = f"{FABRIC_PREFIX}/dead"


def dead_letter_routes(link: QueueLink, gate: Gate) -> APIRouter:
    """Dead letters of the queue at the other end of ``link``."""
    routes = APIRouter(tags=["dead letters"], dependencies=[gate.allow(Access.MEMBER)])

    @routes.get(_DEAD, summary="Dead letters, oldest first", responses=error_responses(400, 401, 503))
    async def letters(
        after: str = Query("", max_length=60), limit: int = Query(100, ge=1, le=MAX_DEAD_LETTERS)
    ) -> DeadLetterList:
        return await link.ready_queue().dead_letters.page(after, limit)

    @routes.get(
        _DEAD + "/{letter_id}",
        summary="One of them, with its request",
        responses=error_responses(400, 401, 404, 503),
    )
    async def letter(letter_id: str) -> DeadRequest:
        found = await link.ready_queue().dead_letters.request(letter_id)
        if found is None:
            raise PathNotFound(f"there is no dead letter {letter_id!r} any more")
        return found

    @routes.post(_DEAD + "/purge", summary="Remove some", responses=error_responses(400, 401, 413, 503))
    async def purge(letters: DeadLetterIds) -> RemovedCount:
        return RemovedCount(removed=await link.ready_queue().dead_letters.forget(letters.ids))

    return routes
