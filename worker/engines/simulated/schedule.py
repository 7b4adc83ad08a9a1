"""Decide when a simulated request runs and when its tokens come. Pure: the clock is an argument, in seconds."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, replace

_EPSILON_S = 1e-9
"""Forgives what floating point loses between a token's time and the clock that waited for it."""


class Slots:
    """``limit`` requests run, the rest wait in the order they came."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running: set[int] = set()
        self._waiting: OrderedDict[int, None] = OrderedDict()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def free(self) -> bool:
        """Whether a request that arrives now runs at once."""
        return len(self._running) < self._limit and not self._waiting

    def arrive(self, request: int) -> bool:
        """Whether ``request`` runs at once; else it waits until a :meth:`leave` returns it."""
        if self.free:
            self._running.add(request)
            return True
        self._waiting[request] = None
        return False

    def leave(self, request: int) -> int | None:
        """``request`` ended, or gave up waiting. Returns the request that runs instead, if one waited."""
        if request in self._waiting:
            del self._waiting[request]
            return None
        self._running.discard(request)
        if not self._waiting or len(self._running) >= self._limit:
            return None
        following, _ = self._waiting.popitem(last=False)
        self._running.add(following)
        return following


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast an engine answers. A ``token_interval_s`` of 0 means all tokens at once."""

    ttft_s: float
    prefill_s_per_token: float
    token_interval_s: float
    lockstep: bool

    def slowed(self, delay_s: float) -> Pace:
        """The same with at least ``delay_s`` before each token."""
        return replace(
            self,
            ttft_s=max(self.ttft_s, delay_s),
            token_interval_s=max(self.token_interval_s, delay_s),
            lockstep=False,
        )

    def first_token_at(self, now: float, prompt_tokens: int, cached_tokens: int) -> float:
        """When the first token of a request that starts ``now`` comes."""
        return now + self.ttft_s + self.prefill_s_per_token * (prompt_tokens - cached_tokens)

    def token_at(self, first_at: float, index: int) -> float:
        """When the ``index``-th token (from 0) of a stream comes whose first comes at ``first_at``."""
        if index == 0 or not self.token_interval_s:
            return first_at
        if self.lockstep:
            return (math.floor(first_at / self.token_interval_s + _EPSILON_S) + index) * self.token_interval_s
        return first_at + index * self.token_interval_s

    def tokens_due(self, first_at: float, now: float, total: int) -> int:
        """How many of ``total`` tokens have come by ``now``."""
        now += _EPSILON_S
        if now < first_at:
            return 0
        if not self.token_interval_s:
            return total
        origin = first_at
        if self.lockstep:
            origin = math.floor(first_at / self.token_interval_s + _EPSILON_S) * self.token_interval_s
        return min(total, math.floor((now - origin) / self.token_interval_s + _EPSILON_S) + 1)
