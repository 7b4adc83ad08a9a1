"""Find out whether another worker of the fleet serves a model, before a failed request is tried elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from broker import Broker
from queue_schemas import InferqError, Pool, SessionId, WorkerInfo
from telemetry import get_logger

CACHE_S = 1.0
"""How long one reading of the registry is used: an engine that fails may fail hundreds of requests at once."""

log = get_logger(__name__)


class Peers:
    """The other workers, by the registry that the acting Manager keeps in Redis.

    Where that cannot be read, or does not even know this worker, there may be others: the answer is yes.
    """

    def __init__(self, broker: Broker, session_id: SessionId) -> None:
        self._broker = broker
        self._session_id = session_id
        self._reading = asyncio.Lock()
        self._read_at = float("-inf")
        self._workers: Mapping[str, WorkerInfo] = {}

    async def is_served_elsewhere(self, pool: Pool) -> bool:
        """Whether another worker takes jobs of ``pool``."""
        async with self._reading:
            now = asyncio.get_running_loop().time()
            if now - self._read_at >= CACHE_S:
                try:
                    self._workers = await self._broker.fleet.load_workers()
                except InferqError as error:
                    log.warning("registry_not_read", error=error.message)
                    self._workers = {}
                self._read_at = now
        workers = self._workers.values()
        if not any(info.session_id == self._session_id for info in workers):
            return True
        return any(info.takes_work and pool in info.models for info in workers if info.session_id != self._session_id)
