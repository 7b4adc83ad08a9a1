"""Decide when a simulated request runs and when its tokens come. Pure: the clock is an argument, in seconds."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, replace

_EPSILON_S = 1e-9
"""Forgives what floating point loses between a token's time and the clock that waited for it."""


class Slots:
    """``limit`` requests run, the rest wait in the order they came.

    With ``kv_blocks`` above 0 a request also holds as many blocks of the KV cache as its tokens fill. It runs once
    those of its prompt are free. When a running one needs more than are free, the request that started last is
    preempted: it frees what it held, waits ahead of the others, and is computed again, as in vLLM
    (https://docs.vllm.ai/en/latest/configuration/optimization.html, "Preemption").
    """

    def __init__(self, limit: int, kv_blocks: int = 0, block_tokens: int = 1) -> None:
        self._limit = limit
        self._kv_blocks = kv_blocks
        self._block_tokens = block_tokens
        self._running: OrderedDict[int, int] = OrderedDict()
        """The blocks that each holds, in the order they started."""
        self._waiting: OrderedDict[int, int] = OrderedDict()
        """The blocks that each needs to run."""
        self._used = 0
        self.preemptions = 0

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def free(self) -> bool:
        """Whether a request that arrives now finds no other before it, and a slot."""
        return len(self._running) < self._limit and not self._waiting

    @property
    def kv_usage(self) -> float:
        """The share of the KV cache that running requests hold, 0 to 1."""
        return self._used / self._kv_blocks if self._kv_blocks else 0.0

    def runs(self, request: int) -> bool:
        """Whether ``request`` runs now."""
        return request in self._running

    def arrive(self, request: int, tokens: int = 0) -> bool:
        """Whether ``request``, its prompt of ``tokens``, runs at once; else it waits until :meth:`leave` names it."""
        is_first = not self._waiting
        self._waiting[request] = self._blocks(tokens)
        return is_first and bool(self._start_waiting())

    def leave(self, request: int) -> list[int]:
        """``request`` ended, or gave up waiting. The requests that run from now on."""
        if self._waiting.pop(request, None) is None:
            self._used -= self._running.pop(request, 0)
        return self._start_waiting()

    def grow(self, request: int, tokens: int) -> list[int]:
        """Running ``request`` has ``tokens`` now, prompt included. The requests that are preempted for it, perhaps
        itself."""
        needed = self._blocks(tokens) - self._running[request]
        preempted: list[int] = []
        while self._kv_blocks and self._used + needed > self._kv_blocks:
            victim, held = self._running.popitem()
            self._used -= held
            self._waiting[victim] = held
            self._waiting.move_to_end(victim, last=False)
            self.preemptions += 1
            preempted.append(victim)
            if victim == request:
                return preempted
        self._running[request] += needed
        self._used += needed
        return preempted

    def _start_waiting(self) -> list[int]:
        started = []
        while self._waiting and len(self._running) < self._limit:
            request, needed = next(iter(self._waiting.items()))
            if self._kv_blocks and self._used + needed > self._kv_blocks:
                break
            del self._waiting[request]
            self._running[request] = needed
            self._used += needed
            started.append(request)
        return started

    def _blocks(self, tokens: int) -> int:
        # One that could never fit alone gets all there is.
        return min(-(-tokens // self._block_tokens), self._kv_blocks)


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast an engine answers. A ``token_interval_s`` of 0 means all tokens at once."""

    ttft_s: float
    prefill_s_per_token: float
    token_interval_s: float
    lockstep: bool
    serial_prefill: bool = False
    """Whether prompts are computed one after another."""

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

    def resumed_at(self, now: float, tokens: int, done: int) -> float:
        """When the first token of a request would have come that has ``done`` tokens already, must compute ``tokens``
        again, prompt included, and goes on ``now``."""
        return now + self.ttft_s + self.prefill_s_per_token * tokens - done * self.token_interval_s

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


class Prefill:
    """When prompts are computed that come to one engine: side by side, or one after another, as its pace says."""

    def __init__(self) -> None:
        self._busy_until = -math.inf

    def first_token_at(self, pace: Pace, now: float, prompt_tokens: int, cached_tokens: int) -> float:
        """When the first token of a request comes that starts ``now``. What one that is aborted had left to compute is
        computed all the same."""
        begins = max(now, self._busy_until) if pace.serial_prefill else now
        first_at = pace.first_token_at(begins, prompt_tokens, cached_tokens)
        self._busy_until = first_at - pace.ttft_s
        return first_at
