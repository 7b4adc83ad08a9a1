"""The KV cache beside independent computations."""

from __future__ import annotations

import random

import pytest

from simulator.engines.kv_cache import DOES_NOT_FIT, KvCache, LruBlocks

BLOCK = 16


def test_blocks_that_stay_behind_are_found_again() -> None:
    """All of them but the last token, which is always computed; in another prompt those up to the first difference."""
    kv = KvCache(1000, BLOCK)
    assert kv.admit((1, 2, 3), 48) == 0
    kv.release((1, 2, 3), 48)
    assert kv.admit((1, 2, 3), 48) == 32
    assert kv.admit((1, 9, 3), 50) == 16
    assert kv.used == 48 + 50 - BLOCK - BLOCK  # both hold blocks 1 and 3 together


def test_what_is_in_use_is_not_given_away() -> None:
    """A sequence that does not fit beside those that run is refused and changes nothing; idle blocks make room."""
    kv = KvCache(100, BLOCK)
    assert kv.admit((1, 2), 40) == 0
    assert kv.admit((7,), 61) == DOES_NOT_FIT
    assert kv.used == 40
    kv.release((1, 2), 40)
    assert kv.admit((7,), 100) == 0
    kv.release((7,), 100)
    assert kv.admit((1, 2), 40) == 0


def test_a_prompts_end_is_forgotten_before_its_beginning() -> None:
    """And the prompt that was used least lately before others; a growing sequence takes room too."""
    kv = KvCache(6 * BLOCK, BLOCK)
    for blocks in ((1, 2, 3), (4, 5, 6)):
        kv.admit(blocks, 3 * BLOCK)
        kv.release(blocks, 3 * BLOCK)
    assert kv.admit((), 2 * BLOCK - 1) == 0
    kv.grow(1)
    kv.release((), 2 * BLOCK)
    assert kv.admit((1, 2, 3), 3 * BLOCK + 1) == BLOCK
    kv.release((1, 2, 3), 3 * BLOCK + 1)
    assert kv.admit((4, 5, 6), 3 * BLOCK + 1) == 2 * BLOCK


def test_blocks_in_the_hosts_memory_are_found_too() -> None:
    """The GPU's room is for sequences, the host's for blocks that nobody uses."""
    kv = KvCache(3 * BLOCK, BLOCK, offload=3 * BLOCK)
    for blocks in ((1, 2, 3), (4, 5, 6)):
        kv.admit(blocks, 3 * BLOCK)
        kv.release(blocks, 3 * BLOCK)
    assert kv.admit((1, 2, 3), 3 * BLOCK) == 2 * BLOCK
    assert kv.admit((4,), BLOCK + 1) == DOES_NOT_FIT


def test_a_shared_cache_forgets_nothing() -> None:
    """What any of several engines computed is held by all."""
    everywhere: set[int] = set()
    one, other = (KvCache(64, BLOCK, everywhere=everywhere) for _ in range(2))
    for first in range(0, 100, 4):
        one.admit(tuple(range(first, first + 4)), 64)
        one.release((), 64)
    assert other.admit((0, 1, 2, 3), 64) == 48
    assert other.admit((), 1) == DOES_NOT_FIT


@pytest.mark.parametrize("seed", range(5))
def test_hits_are_those_of_a_list(seed: int) -> None:
    """Without overlap of sequences: a list of blocks, the least recently used first, gives the same."""
    draw = random.Random(seed)
    kv, held = KvCache(20 * BLOCK, BLOCK), list[int]()
    for _ in range(500):
        conversation, length = draw.randrange(6), draw.randint(1, 8)
        blocks = tuple(conversation * 10 + place for place in range(length))
        tokens = length * BLOCK + draw.randrange(BLOCK)
        hits = 0
        while hits < length and blocks[hits] in held:
            hits += 1
        assert kv.admit(blocks, tokens) == min(hits * BLOCK, (tokens - 1) // BLOCK * BLOCK)
        kv.release(blocks, tokens)
        held = [block for block in held if block not in blocks]
        del held[: max(len(held) - (20 * BLOCK - tokens) // BLOCK, 0)]
        held += reversed(blocks)


def test_the_simulated_engines_cache() -> None:
    """The blocks used last, no more of a prompt than fit."""
    cache = LruBlocks(3)
    assert cache.touch((1, 2)) == 0
    assert cache.touch((1, 2, 3, 4)) == 2
    assert cache.touch((9,)) == 0
    assert cache.touch((1, 2)) == 0
    assert cache.touch((9, 1, 2)) == 3
