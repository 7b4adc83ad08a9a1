"""A session's calls over HTTP: what :class:`broker.Workers` is over Redis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from queue_schemas import Claimed, Control, ControlKind, JobId, Lane, Lease, Pool, SessionId
from queue_schemas.worker_protocol.messages import ClaimAnswer, ControlMessage, Reconciled

from ..registration.addresses import Addresses
from .calls import RouterCalls
from .held_leases import HeldLeases, tokens_of

POLL_MS = 20_000
"""How long a Router holds a call for control messages: below what proxies close as idle."""


class HttpWorkers:
    """The calls of one worker's sessions. A session joins as it registers (:mod:`worker.over_http.manager_client`)."""

    def __init__(self, calls: RouterCalls, addresses: Addresses, shards: int, held: HeldLeases) -> None:
        self._calls = calls
        self._addresses = addresses
        self._shards = shards
        self._held = held
        self._failed: set[int] = set()
        """Shards of which the last call for control messages failed."""
        self._read_to: dict[tuple[int, SessionId], str] = {}
        """By shard and session: up to where control messages were read."""

    async def join(self, session_id: SessionId) -> set[int]:
        """As :meth:`broker.Workers.join`, of a session that is registered: so it is on all shards."""
        self._held.session_id = session_id
        self._read_to.clear()
        return set()

    async def join_on(self, shard: int, session_id: SessionId) -> None:
        """As :meth:`broker.Workers.join_on`: it is on each already."""

    async def claim(
        self,
        shard: int,
        session_id: SessionId,
        seq: int,
        turn: int,
        n: int,
        pools: Sequence[tuple[Pool, Sequence[Lane]]],
        region: str = "",
        *,
        offer: int = 0,
        received: int = 0,
        cache: int = 0,
        slots: int = 0,
        capacity: int = 0,
    ) -> Claimed:
        """As :meth:`broker.Workers.claim`."""
        claim = {
            "seq": seq,
            "turn": turn,
            "n": n,
            "pools": [{"pool": pool, "lanes": [lane.value for lane in lanes]} for pool, lanes in pools],
            "region": region,
            "offer": offer,
            "received": received,
            "cache": cache,
            "slots": slots,
            "capacity": capacity,
        }
        answer = await self._claim(session_id, {"shard": shard, "claim": claim})
        claimed = answer.claimed
        if claimed is None:
            return Claimed()
        leases = tuple(map(self._held.take, claimed.jobs))
        return Claimed(leases, claimed.parked, claimed.handed_over, claimed.offered)

    def renewer_apart(self) -> HttpRenewer:
        """As :meth:`broker.Workers.renewer_apart`."""
        return HttpRenewer(RouterCalls(self._addresses))

    async def reconcile_leases(self, shard: int, session_id: SessionId, seq: int, leases: Sequence[Lease]) -> set[str]:
        """As :meth:`broker.Workers.reconcile_leases`."""
        read_to = self._read_to.get((shard, session_id), "0")
        message = {"shard": shard, "after": read_to, "seq": seq, "leases": tokens_of(leases)}
        lost = (await self._calls.ask(f"/sessions/{session_id}/reconcile", message, Reconciled)).lost
        return {lease.attempt_id for lease in leases if lease.job.reply_to in lost}

    async def leave(self, session_id: SessionId) -> None:
        """As :meth:`broker.Workers.leave`."""
        await self._calls.send("DELETE", f"/sessions/{session_id}")

    async def read_control(
        self, shard: int, session_id: SessionId, after: str, block_ms: int
    ) -> list[tuple[str, Control | None]]:
        """As :meth:`broker.Workers.read_control`; it waits for longer than ``block_ms``."""
        # Whether a call that failed is answered again is to be known soon.
        wait_ms = 1 if shard in self._failed else max(block_ms, POLL_MS)
        call = {"shard": shard, "after": after, "wait_ms": wait_ms}
        self._failed.add(shard)
        answer = await self._claim(session_id, call, wait_s=wait_ms / 1000)
        self._failed.discard(shard)
        self._read_to[(shard, session_id)] = after
        return [(message.id, self._control(message)) for message in answer.messages]

    async def _claim(self, session_id: SessionId, call: dict[str, Any], *, wait_s: float = 0.0) -> ClaimAnswer:
        return await self._calls.ask(f"/sessions/{session_id}/claim", call, ClaimAnswer, wait_s=wait_s)

    def _control(self, message: ControlMessage) -> Control | None:
        try:
            kind = ControlKind(message.kind)
        except ValueError:
            return None
        job_id = JobId(message.job_id) if message.job_id else None
        lease = None if message.job is None else self._held.take(message.job)
        return Control(kind, job_id, message.reason, lease, message.attempt_id)


class HttpRenewer:
    """As :class:`broker.Renewer`, with connections of its own."""

    def __init__(self, calls: RouterCalls) -> None:
        self._calls = calls

    async def renew(self, session_id: SessionId) -> None:
        """Keep all leases of ``session_id``. Raises ``Fenced`` if it was declared dead, and ``BrokerUnavailable``."""
        await self._calls.send("POST", f"/sessions/{session_id}/renew")

    async def close(self) -> None:
        """Close the connections."""
        await self._calls.close()
