"""inferq's simulated engine: running requests do not slow each other down. Its times are the product's own."""

from __future__ import annotations

from collections import deque

from worker.engines.simulated.schedule import Pace

from ..clock import Clock
from ..requests import Request
from .kv_cache import LruBlocks
from .port import EngineListener


class PacedEngine:
    """Implements :class:`simulator.engines.port.Engine` as ``worker.engines.simulated`` does: ``max_seqs`` requests
    run, the rest wait in the order they came."""

    __slots__ = ("_block_tokens", "_cache", "_clock", "_listener", "_max_seqs", "_pace", "_running", "_waiting")

    def __init__(
        self,
        clock: Clock,
        pace: Pace,
        max_seqs: int,
        cache: LruBlocks,
        block_tokens: int,
        listener: EngineListener,
    ) -> None:
        self._clock = clock
        self._pace = pace
        self._max_seqs = max_seqs
        self._cache = cache
        self._block_tokens = block_tokens
        self._listener = listener
        self._running = 0
        self._waiting: deque[Request] = deque()

    def submit(self, request: Request) -> None:
        """Run ``request``, beginning behind the tokens that it has."""
        if self._running < self._max_seqs:
            self._begin(request)
        else:
            self._waiting.append(request)

    def _begin(self, request: Request) -> None:
        self._running += 1
        tokens, size = request.prompt_tokens + request.generated, self._block_tokens
        cached = min(self._cache.touch(request.blocks) * size, (tokens - 1) // size * size)
        request.cached = cached
        self._listener.started(request)
        first_at = self._pace.first_token_at(self._clock.now, tokens, cached)
        request.first_at = first_at
        last_at = self._pace.token_at(first_at, request.output_tokens - request.generated - 1)
        self._clock.at(last_at, self._finish, request)

    def _finish(self, request: Request) -> None:
        request.generated = request.output_tokens
        self._running -= 1
        if self._waiting:
            self._begin(self._waiting.popleft())
        self._listener.finished(request)
