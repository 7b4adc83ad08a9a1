"""``HttpQueue``: what :class:`broker.Broker` is to a worker, over HTTP.

The worker holds signed leases; the Router makes the frames. So output is unpacked here into pieces, and each job's
``reply_to`` is its lease.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from urllib.parse import quote

from queue_schemas import Frame, JobId, Pool
from queue_schemas.worker_protocol.encoding import MSGPACK, decode
from queue_schemas.worker_protocol.messages import ServedElsewhere

from ..registration.addresses import Addresses
from .attempts import HttpAttempts
from .calls import RouterCalls
from .held_leases import HeldLeases
from .workers import HttpWorkers


class HttpQueue:
    """The queue through Routers. Its parts are those of a Broker that workers use, and raise the same errors."""

    def __init__(self, addresses: Addresses, shards: int) -> None:
        self.shards = shards
        self._calls = RouterCalls(addresses)
        self._held = HeldLeases()
        self.workers = HttpWorkers(self._calls, addresses, shards, self._held)
        self.attempts = HttpAttempts(self._calls, self._held)
        self.output = HttpOutput(self._calls, self._held)

    @property
    def round_trips(self) -> int:
        """Calls sent so far, without those of renewers with connections of their own."""
        return self._calls.sent

    async def is_served_elsewhere(self, pool: Pool) -> bool:
        """Whether another worker takes jobs of ``pool``."""
        session_id = self._held.session_id
        content = await self._calls.send("GET", f"/sessions/{session_id}/elsewhere?model={quote(pool, safe='')}")
        return decode(content, MSGPACK, ServedElsewhere).served

    async def close(self) -> None:
        """Close the connections; calls still under way are cancelled."""
        await self.attempts.close()
        await self._calls.close()


class HttpOutput:
    """The output of persisted jobs that this worker runs."""

    def __init__(self, calls: RouterCalls, held: HeldLeases) -> None:
        self._calls = calls
        self._held = held

    async def frames(self, job_id: JobId) -> AsyncIterator[Frame]:
        """What is kept of a job's output now, as one frame."""
        lease, session_id = self._held.token_of(job_id), self._held.session_id
        data = await self._calls.send("POST", f"/sessions/{session_id}/delivered", {"lease": lease})
        if data:
            yield Frame(job_id, 0, "", 0, 0, data)
