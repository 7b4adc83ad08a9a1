"""The KV cache of one engine: what its sequences hold, and which blocks of prompts stay behind for others.

As in vLLM (https://docs.vllm.ai/en/latest/design/prefix_caching.html): a prompt's leading blocks that are held need no
prefill, blocks are shared by the sequences that use them, and what nobody uses stays until room is needed, the least
recently used first, of one prompt its end first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

DOES_NOT_FIT = -1


class KvCache:
    """``capacity`` tokens in blocks of ``block_tokens``, and room elsewhere for ``offload`` tokens that nobody uses.

    With ``everywhere``, which several caches may share, blocks that any of them ever computed count as held: a bound
    for what affinity can reach.
    """

    __slots__ = ("_block_tokens", "_everywhere", "_idle", "_offload", "_users", "capacity", "used")

    def __init__(
        self, capacity: int, block_tokens: int, *, offload: int = 0, everywhere: set[int] | None = None
    ) -> None:
        self.capacity = capacity
        self.used = 0
        """Tokens that sequences hold; the rest of the capacity is free or idle."""
        self._block_tokens = block_tokens
        self._offload = offload
        self._users: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._everywhere = everywhere

    @property
    def keeps(self) -> int | None:
        """How many tokens it holds, running or idle, before it forgets; None: an engine's metrics do not say."""
        return None if self._everywhere is not None or self._offload else self.capacity

    def admit(self, blocks: Sequence[int], tokens: int) -> int:
        """Make room for a sequence of ``tokens`` that begins with ``blocks``. Returns how many of its tokens need no
        prefill, or ``DOES_NOT_FIT``. The last token is always computed."""
        size, held = self._block_tokens, self._everywhere
        if held is not None:
            if self.used + tokens > self.capacity:
                return DOES_NOT_FIT
            self.used += tokens
            hits = _leading(blocks, held)
            held.update(blocks)
            return min(hits * size, (tokens - 1) // size * size)
        users, idle = self._users, self._idle
        unused = sum(1 for block in blocks if block not in users) if blocks else 0
        needed = tokens - (len(blocks) - unused) * size
        if self.used + needed > self.capacity:
            return DOES_NOT_FIT
        self.used += needed
        hits = 0
        for block in blocks:
            if block in users:
                users[block] += 1
            elif block in idle:
                del idle[block]
                users[block] = 1
            else:
                break
            hits += 1
        for block in blocks[hits:]:
            idle.pop(block, None)
            users[block] = users.get(block, 0) + 1
        self._make_room()
        return min(hits * size, (tokens - 1) // size * size)

    def grow(self, tokens: int) -> None:
        """Sequences have so many tokens more."""
        self.used += tokens
        self._make_room()

    def release(self, blocks: Sequence[int], tokens: int) -> None:
        """A sequence that begins with ``blocks`` and has ``tokens`` in all ends. Its blocks stay as long as there is
        room."""
        if self._everywhere is not None:
            self.used -= tokens
            return
        users = self._users
        self.used -= tokens - len(blocks) * self._block_tokens
        for block in reversed(blocks):
            if users[block] > 1:
                users[block] -= 1
            else:
                del users[block]
                self._idle[block] = None
                self.used -= self._block_tokens

    def _make_room(self) -> None:
        idle = self._idle
        room = max(self.capacity + self._offload - self.used, 0) // self._block_tokens
        while len(idle) > room:
            idle.popitem(last=False)


class LruBlocks:
    """The prefix cache of inferq's simulated engine: the ``capacity`` blocks used last, whoever runs."""

    __slots__ = ("_blocks", "_capacity")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[int, None] = OrderedDict()

    @property
    def keeps(self) -> int:
        """How many blocks it holds before it forgets."""
        return self._capacity

    def touch(self, blocks: Sequence[int]) -> int:
        """How many leading ones of ``blocks`` are held; from now on all are."""
        blocks, held = blocks[: self._capacity], self._blocks
        hits = _leading(blocks, held)
        for block in blocks:
            held[block] = None
            held.move_to_end(block)
        while len(held) > self._capacity:
            held.popitem(last=False)
        return hits


def _leading(blocks: Sequence[int], held: OrderedDict[int, None] | set[int]) -> int:
    for place, block in enumerate(blocks):
        if block not in held:
            return place
    return len(blocks)
