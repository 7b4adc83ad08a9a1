"""The simulated prefix cache: which leading blocks of a prompt the engine has seen; the least recently used go first.

Block hashes are chained as vLLM's are, so a block counts only behind the same beginning
(https://docs.vllm.ai/en/latest/design/prefix_caching.html).
"""

from __future__ import annotations

from collections import OrderedDict

from .tokens import CHARS_PER_TOKEN


class PrefixCache:
    """``capacity`` blocks of ``block_tokens`` tokens; a capacity of 0 switches it off."""

    def __init__(self, capacity: int, block_tokens: int) -> None:
        self._capacity = capacity
        self._block_tokens = block_tokens
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self.queried_tokens = 0
        self.hit_tokens = 0

    def admit(self, salt: str, prompt: str, prompt_tokens: int) -> int:
        """Count a prompt and remember its full blocks. Returns how many of its tokens were held already.

        ``salt`` keeps apart what must not share a cache (models). The last token is always computed, so it never counts
        as held.
        """
        if not self._capacity:
            return 0
        held = self._remember(salt, prompt)
        cached = min(held * self._block_tokens, max(prompt_tokens - 1, 0) // self._block_tokens * self._block_tokens)
        self.queried_tokens += prompt_tokens
        self.hit_tokens += cached
        return cached

    def _remember(self, salt: str, prompt: str) -> int:
        size = self._block_tokens * CHARS_PER_TOKEN
        blocks = self._blocks
        chain = hash(salt)
        held, unbroken = 0, True
        # Full blocks only, and no more than fit: a longer prompt would push out its own beginning.
        for end in range(size, min(len(prompt), self._capacity * size) + 1, size):
            chain = hash((chain, prompt[end - size : end]))
            if chain in blocks:
                blocks.move_to_end(chain)
                held += unbroken
            else:
                unbroken = False
                blocks[chain] = None
        while len(blocks) > self._capacity:
            blocks.popitem(last=False)
        return held
