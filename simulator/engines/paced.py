"""inferq's simulated engine: running requests do not slow each other down. Its times are the product's own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from scheduling.slots import EngineLoad
from worker.engines.simulated.schedule import Pace, Prefill

from ..clock import Clock
from ..requests import Request
from .kv_cache import LruBlocks
from .port import EngineListener


class PacedEngine:
    """Implements :class:`simulator.engines.port.Engine` as ``worker.engines.simulated`` does: ``max_seqs`` requests
    run, the rest wait in the order they came."""

    __slots__ = (
        "_block_tokens",
        "_cache",
        "_clock",
        "_generated",
        "_hits",
        "_listener",
        "_looked_up",
        "_max_seqs",
        "_pace",
        "_prefill",
        "_running",
        "_waiting",
    )

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
        self._prefill = Prefill()
        self._max_seqs = max_seqs
        self._cache = cache
        self._block_tokens = block_tokens
        self._listener = listener
        self._running: dict[Request, tuple[float, int]] = {}
        """When the first of the tokens to come comes, and how many there are."""
        self._waiting: deque[Request] = deque()
        self._looked_up = self._hits = self._generated = 0
        """Prompt tokens looked up in the prefix cache, those of them that it held, and tokens generated."""

    def submit(self, request: Request) -> None:
        """Run ``request``, beginning behind the tokens that it has."""
        if len(self._running) < self._max_seqs:
            self._begin(request)
        else:
            self._waiting.append(request)

    def abort(self, request: Request, stopped: Callable[[Request], None]) -> None:
        """Stop ``request`` now, and call ``stopped``."""
        if request in self._waiting:
            self._waiting.remove(request)
        elif request in self._running:
            first_at, missing = self._running.pop(request)
            due = self._pace.tokens_due(first_at, self._clock.now, missing)
            request.generated += due
            if not request.generated:
                request.first_at = -1.0
            self._begin_waiting()
        else:
            return  # it has ended
        stopped(request)

    def load(self) -> EngineLoad:
        """What its metrics would say now, but for the KV cache, which it has none of."""
        return EngineLoad(
            waiting=len(self._waiting),
            running=len(self._running),
            prefix_queries=self._looked_up,
            prefix_hits=self._hits,
            generated=self._generated,
            cache_tokens=self._cache.keeps * self._block_tokens,
        )

    def _begin(self, request: Request) -> None:
        tokens, size = request.prompt_tokens + request.generated, self._block_tokens
        cached = min(self._cache.touch(request.blocks) * size, (tokens - 1) // size * size)
        self._looked_up += tokens
        self._hits += cached
        if request.started_at < 0:
            request.cached = cached
        else:
            request.redone += tokens - cached
        self._listener.started(request)
        first_at = self._prefill.first_token_at(self._pace, self._clock.now, tokens, cached)
        if not request.generated:
            request.first_at = first_at
        missing = request.output_tokens - request.generated
        self._running[request] = (first_at, missing)
        self._clock.at(self._pace.token_at(first_at, missing - 1), self._finish, (request, first_at))

    def _finish(self, attempt: tuple[Request, float]) -> None:
        request, first_at = attempt
        if self._running.get(request, (None, 0))[0] != first_at:
            return  # it was stopped
        self._generated += self._running.pop(request)[1]
        request.generated = request.output_tokens
        self._begin_waiting()
        self._listener.finished(request)

    def _begin_waiting(self) -> None:
        if self._waiting:
            self._begin(self._waiting.popleft())
