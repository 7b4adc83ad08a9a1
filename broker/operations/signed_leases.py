"""What Routers ask of the queue for workers that hold signed leases, over HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from queue_schemas import Job, Lease, SessionId, ShardKeys
from queue_schemas.keys import LEASE_SECRET, keys_of_job

from ..redis.calls import Caller


class SignedLeases:
    """The secret that signs leases, and what the queue knows of those who hold them."""

    def __init__(self, caller: Caller, keys: Sequence[ShardKeys]) -> None:
        self._caller = caller
        self._keys = keys

    async def secret(self, proposed: bytes) -> bytes:
        """What Routers sign with: ``proposed``, unless there is one already."""
        await self._caller.command(LEASE_SECRET, "SET", LEASE_SECRET, proposed, "NX")
        found: bytes | None = await self._caller.command(LEASE_SECRET, "GET", LEASE_SECRET)
        return found or proposed

    async def held(self, shard: int, session_id: SessionId) -> int:
        """How many jobs of ``shard`` are leased to ``session_id``. One try."""
        key = self._keys[shard].leases(session_id)
        return int(await self._caller.once(key, "HLEN", key))

    async def job_of(self, lease: Lease) -> Job | None:
        """The job that ``lease`` is of, as it stands on the queue; None if it is not there. One try."""
        key = keys_of_job(self._keys, lease.job.id).job(lease.job.id)
        envelope = await self._caller.once(key, "HGET", key, "env")
        return None if envelope is None else Job.unpack(envelope)
