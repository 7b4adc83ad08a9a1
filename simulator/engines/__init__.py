"""The engine model: steps of continuous batching over a KV cache, and inferq's simulated engine."""

from __future__ import annotations

from collections.abc import Callable

from ..clock import Clock
from .batching import BatchingEngine
from .kv_cache import KvCache, LruBlocks
from .paced import PacedEngine
from .port import Engine, EngineListener
from .profile import DEFAULT_PROFILE, PROFILES, EngineProfile

__all__ = ["DEFAULT_PROFILE", "PROFILES", "Engine", "EngineListener", "EngineProfile", "engine_factory"]


def engine_factory(
    clock: Clock, profile: EngineProfile, block_tokens: int, listener: EngineListener, *, shared_cache: bool = False
) -> Callable[[], Engine]:
    """Makes engines of that profile. ``shared_cache``: all of them have one prefix cache, which forgets nothing."""
    pace = profile.pace
    if pace is None:
        everywhere: set[int] | None = set() if shared_cache else None

        def batching() -> Engine:
            kv = KvCache(profile.kv_tokens, block_tokens, offload=profile.offload_tokens, everywhere=everywhere)
            return BatchingEngine(clock, profile, kv, listener)

        return batching
    endless = LruBlocks(1 << 62) if shared_cache else None

    def paced() -> Engine:
        cache = endless or LruBlocks(profile.kv_tokens // block_tokens)
        return PacedEngine(clock, pace, profile.max_seqs, cache, block_tokens, listener)

    return paced
