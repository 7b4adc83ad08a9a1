"""Renew a worker session's leases on every shard at the same time, without waiting long for any one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from queue_schemas import BrokerUnavailable, Fenced, SessionId, ShardKeys

from .redis.calls import Caller


class Renewer:
    """Renews over ``caller``. ``read_to`` says, per shard and session id, which control messages were read: older ones
    are trimmed.

    The Broker's own shares its connection. One made by :meth:`Workers.renewer_apart` has another, for another thread's
    event loop, and tries each call once: whether to renew is decided anew for the next try. Shards are renewed at the
    same time, and one that does not answer within ``shard_timeout_s`` is not waited for. Those in ``unjoined`` are left
    out.
    """

    def __init__(
        self,
        caller: Caller,
        keys: Sequence[ShardKeys],
        read_to: Mapping[tuple[int, str], str],
        unjoined: Mapping[str, set[int]],
        shard_timeout_s: float | None = None,
    ) -> None:
        self._caller = caller
        self._keys = keys
        self._read_to = read_to
        self._unjoined = unjoined
        self._shard_timeout_s = shard_timeout_s
        self._unanswered: dict[str, dict[int, asyncio.Task[int]]] = {}

    async def renew(self, session_id: SessionId) -> None:
        """Keep all leases of ``session_id`` on the shards that answer. Raises ``Fenced`` if it was declared
        dead, and like any call if no shard answers."""
        unjoined = self._unjoined.get(session_id, ())
        own = self._unanswered.setdefault(session_id, {})
        for keys in self._keys:
            if keys.shard not in unjoined and keys.shard not in own:
                own[keys.shard] = asyncio.create_task(self._renew(keys, session_id))
        asked = dict(own)
        if asked:
            await asyncio.wait(asked.values(), timeout=self._shard_timeout_s)
        done = {shard: task for shard, task in asked.items() if task.done()}
        for shard, task in done.items():
            if own.get(shard) is task:
                del own[shard]
        if not own:
            self._unanswered.pop(session_id, None)
        if not asked:
            return
        failures = [task.exception() for task in done.values()]
        if any(error is None and task.result() < 0 for error, task in zip(failures, done.values(), strict=True)):
            raise Fenced(f"{session_id} was declared dead: join again as a new session_id")
        if any(error is None for error in failures):
            return
        for error in failures:
            if error is not None:
                raise error
        raise BrokerUnavailable("the queue's Redis does not answer renewals in time", retry_after_s=2)

    async def _renew(self, keys: ShardKeys, session_id: SessionId) -> int:
        read_to = self._read_to.get((keys.shard, session_id), "0")
        return int(await self._caller.script("renew", keys.budget, keys.prefix, session_id, read_to))

    async def close(self) -> None:
        """Close the connection."""
        tasks = [task for own in self._unanswered.values() for task in own.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._caller.link.close()
