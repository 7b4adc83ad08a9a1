"""When an engine's prefix cache has forgotten what it served, by what its metrics say it has stored since.

An engine stores every token that it computes, in what running requests leave free of its KV cache, and drops what was
used least lately (vLLM: https://docs.vllm.ai/en/latest/design/prefix_caching.html). So a prefix is gone once that room
has been filled anew. A worker numbers its cache: the number rises whenever the room was filled (:func:`next_age`), and
a prefix that was leased under the number before last is cold (:func:`.affinity.holds`). To believe in a prefix too long
costs little, to forget it too soon costs its hits: so each is believed in for one to two fillings.
"""

from __future__ import annotations

from typing import Final

from queue_schemas.records import record

from .slots import EngineLoad

GENERATIONS: Final = 2
"""So many of its latest numbers count as warm: a number that rises by as much makes all cold."""
MIN_ROOM: Final = 0.1
"""Share of the KV cache that counts as free at least: requests that fill it whole come and go, and what they share with
others stays."""


@record
class CacheAge:
    """What a cache stored since its number rose, as a share of its room; ``stored`` is the engine's count of
    tokens at the last reading, None before one."""

    share: float = 0.0
    stored: int | None = None


def next_age(age: CacheAge, load: EngineLoad | None) -> tuple[CacheAge, int]:
    """The age after one reading, and by how much the cache's number rises: ``GENERATIONS`` at most, which makes all
    cold. An engine that does not say what its cache holds and stores has one that forgets nothing; a cache of no
    tokens forgets at once."""
    stored = _stored(load)
    if load is None or load.cache_tokens is None or stored is None:
        return age, 0
    if age.stored is None:
        return CacheAge(age.share, stored), 0
    if stored < age.stored:  # it began to count anew: another engine, or one that was restarted
        return CacheAge(0.0, stored), GENERATIONS
    room = load.cache_tokens * max(1 - (load.kv_usage or 0.0), MIN_ROOM)
    new = stored - age.stored
    share = age.share + (new / room if room else float(bool(new) * GENERATIONS))
    rises = min(int(share), GENERATIONS)
    return CacheAge(share % 1.0, stored), rises


def _stored(load: EngineLoad | None) -> int | None:
    """The tokens that the engine has computed, and so stored, since it started."""
    if load is None or load.prefix_queries is None or load.prefix_hits is None or load.generated is None:
        return None
    return max(load.prefix_queries - load.prefix_hits, 0) + load.generated
