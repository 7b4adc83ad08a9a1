"""Renewing: raising an incarnation's number on every shard, which keeps all that it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from queue_schemas import Fenced, Incarnation, ShardKeys

from .calls import Caller


class Renewer:
    """Renews over ``caller``. ``read_to`` says, per shard and incarnation, which control messages were read: older ones
    are trimmed.

    The Broker's own shares its connection. One made by :meth:`Broker.renewer_apart` has another, for another thread's
    event loop, and tries each call once: whether to renew is decided anew for the next try.
    """

    def __init__(self, caller: Caller, keys: Sequence[ShardKeys], read_to: Mapping[tuple[int, str], str]) -> None:
        self._caller = caller
        self._keys = keys
        self._read_to = read_to

    async def renew(self, incarnation: Incarnation) -> None:
        """Keep all leases of ``incarnation``. Raises ``Fenced`` if it was declared dead, and like any call."""
        for keys in self._keys:
            read_to = self._read_to.get((keys.shard, incarnation), "0")
            if await self._caller.script("renew", keys.budget, keys.prefix, incarnation, read_to) < 0:
                raise Fenced(f"{incarnation} was declared dead: join again as a new incarnation")

    async def close(self) -> None:
        """Close the connection."""
        await self._caller.link.close()
