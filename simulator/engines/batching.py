"""An engine with continuous batching and chunked prefill, at the grain of stretches of equal steps.

While nobody comes, finishes or runs out of room, steps differ by the KV tokens alone, so the time of ``k`` steps is a
polynomial in ``k``: a stretch is one event however many tokens it makes. Within a step the model is vLLM's scheduler
(https://docs.vllm.ai/en/latest/configuration/optimization.html): each decoding sequence gets a token, the rest of the
step's tokens go to prompts, first come first served; when the KV cache is full, the sequence that came last gives its
room back and is computed anew later.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush

from scheduling.slots import EngineLoad

from ..clock import Clock
from ..requests import Request
from .kv_cache import DOES_NOT_FIT, KvCache
from .port import EngineListener
from .profile import EngineProfile

_EPSILON = 1e-9
_ENDLESS = 1 << 62


class _Prompt:
    """A request whose prompt is computed: ``left`` of its ``tokens`` are still to do."""

    __slots__ = ("left", "request", "tokens")

    def __init__(self, request: Request, tokens: int, left: int) -> None:
        self.request = request
        self.tokens = tokens
        self.left = left


class BatchingEngine:
    """Implements :class:`simulator.engines.port.Engine`."""

    __slots__ = (
        "_began_at", "_clock", "_done", "_ends", "_first_s", "_generated", "_growth_s", "_held", "_hits", "_kv",
        "_leaving", "_left", "_listener", "_looked_up", "_plan_number", "_planned", "_preemptions", "_prefilled",
        "_profile", "_prompts", "_running", "_waiting",
    )  # fmt: skip

    def __init__(self, clock: Clock, profile: EngineProfile, kv: KvCache, listener: EngineListener) -> None:
        self._clock = clock
        self._profile = profile
        self._kv = kv
        self._listener = listener
        self._waiting: deque[Request] = deque()
        self._left = 0
        """How many of those found no room when the scheduler looked last."""
        self._prompts: deque[_Prompt] = deque()
        self._leaving: list[tuple[Request, Callable[[Request], None]]] = []
        """Those that are to be stopped after the step that is under way, and who hears of it."""
        self._preemptions = 0
        self._looked_up = self._hits = self._generated = 0
        """Prompt tokens looked up in the prefix cache, those of them that it held, and tokens generated."""
        self._running: dict[Request, tuple[int, int]] = {}
        """What decodes: the step of its last token, and the tokens that it then holds."""
        self._ends: list[tuple[int, int, Request]] = []
        """The same by the step of the last token; those that are not running any more are passed over."""
        self._held = 0
        """Tokens of the sequences that decode."""
        self._done = 0
        """Steps so far."""
        self._plan_number = 0
        self._planned = 0
        """Steps of the stretch under way; 0: idle."""
        self._began_at = 0.0
        self._prefilled = 0
        """Prompt tokens in each of its steps."""
        self._first_s = self._growth_s = 0.0
        """Time of its first step, and what each step takes longer than the one before."""

    def submit(self, request: Request) -> None:
        """Run ``request``, beginning behind the tokens that it has."""
        if request.prompt_tokens + request.output_tokens > self._kv.capacity:
            self._listener.refused(request)
            return
        self._waiting.append(request)
        if not self._planned:
            self._plan()
        elif not self._prefilled and len(self._running) < self._profile.max_seqs:
            self._end_soon()

    def abort(self, request: Request, stopped: Callable[[Request], None]) -> None:
        """Stop ``request`` with the step that is under way, unless that is its last, and call ``stopped``."""
        if request in self._waiting:
            self._waiting.remove(request)
            stopped(request)
        else:
            self._leaving.append((request, stopped))
            self._end_soon()

    def load(self) -> EngineLoad:
        """What its metrics would say now: vLLM counts what waits as its scheduler left it before the step under way
        (``EngineCore.step`` takes in nothing meanwhile)."""
        return EngineLoad(
            waiting=min(self._left, len(self._waiting)),
            running=len(self._running) + len(self._prompts),
            kv_usage=(self._kv.used + len(self._running) * (self._begun() if self._planned else 0)) / self._kv.capacity,
            preemptions=self._preemptions,
            prefix_queries=self._looked_up,
            prefix_hits=self._hits,
            generated=self._generated,
            cache_tokens=self._kv.keeps,
        )

    def _plan(self) -> None:
        """Begin the next stretch, if there is anything to do."""
        self._admit()
        self._left = len(self._waiting)
        kv, running, profile = self._kv, self._running, self._profile
        while True:
            sequences = len(running)
            steps, prefilled = self._prefill_steps(sequences)
            if sequences:
                steps = min(steps, self._next_end() - self._done, (kv.capacity - kv.used) // sequences)
            if steps:
                break
            self._preempt()
        if steps == _ENDLESS:
            self._planned = 0
            return
        self._planned, self._prefilled, self._began_at = steps, prefilled, self._clock.now
        self._growth_s = profile.kv_s * sequences
        self._first_s = (
            profile.step_s + profile.prefill_s * prefilled + profile.sequence_s * sequences + profile.kv_s * self._held
        )
        self._schedule()

    def _admit(self) -> None:
        """Take waiting requests in while there is room. A prompt's blocks count as held from here on: the prompts
        behind it are computed later."""
        waiting, kv = self._waiting, self._kv
        while waiting and len(self._running) + len(self._prompts) < self._profile.max_seqs:
            request = waiting[0]
            tokens = request.prompt_tokens + request.generated
            cached = kv.admit(request.blocks, tokens)
            if cached == DOES_NOT_FIT:
                return
            waiting.popleft()
            self._looked_up += tokens
            self._hits += cached
            if request.started_at >= 0:
                request.redone += tokens - cached
            else:
                request.cached = cached
            self._prompts.append(_Prompt(request, tokens, tokens - cached))
            self._listener.started(request)

    def _prefill_steps(self, sequences: int) -> tuple[int, int]:
        """How many steps are alike as far as prompts go, and the prompt tokens in each."""
        if not self._prompts:
            return _ENDLESS, 0
        room = max(self._profile.step_tokens - sequences, 1)
        if (left := self._prompts[0].left) > room:
            return (left - 1) // room, room
        packed = 0
        for prompt in self._prompts:
            packed += prompt.left
            if packed >= room:
                return 1, room
        return 1, packed

    def _next_end(self) -> int:
        """The step in which the next sequence has its last token."""
        ends, running = self._ends, self._running
        while True:
            step, _, request = ends[0]
            if request in running and running[request][0] == step:
                return step
            heappop(ends)

    def _preempt(self) -> None:
        """Take the room of the sequence that came last; it waits before all others."""
        request = next(reversed(self._running))
        self._stop_decoding(request)
        self._waiting.appendleft(request)
        self._preemptions += 1

    def _stop_decoding(self, request: Request) -> None:
        """``request`` keeps what it has generated, and holds nothing."""
        last_step, tokens = self._running.pop(request)
        missing = last_step - self._done
        request.generated = request.output_tokens - missing
        self._held -= tokens - missing
        self._kv.release(request.blocks, tokens - missing)

    def _stop_leaving(self) -> None:
        leaving, self._leaving = self._leaving, []
        for request, stopped in leaving:
            if request in self._running:
                self._stop_decoding(request)
            else:
                prompt = next((prompt for prompt in self._prompts if prompt.request is request), None)
                if prompt is None:
                    continue  # it has ended
                self._prompts.remove(prompt)
                self._kv.release(request.blocks, prompt.tokens)
            stopped(request)

    def _schedule(self) -> None:
        self._plan_number += 1
        steps = self._planned
        lasts_s = steps * self._first_s + self._growth_s * steps * (steps - 1) / 2
        self._clock.at(self._began_at + lasts_s, self._stretch_ended, self._plan_number)

    def _begun(self) -> int:
        """How many steps of the stretch have begun; one of them is under way."""
        passed_s = self._clock.now - self._began_at
        growth_s, first_s = self._growth_s, self._first_s
        if growth_s:
            linear = first_s - growth_s / 2
            steps = (math.sqrt(linear * linear + 2 * growth_s * passed_s) - linear) / growth_s
        else:
            steps = passed_s / first_s
        return max(math.ceil(steps - _EPSILON), 1)

    def _end_soon(self) -> None:
        """End the stretch with the step that is under way."""
        begun = self._begun()
        if begun < self._planned:
            self._planned = begun
            self._schedule()

    def _stretch_ended(self, plan_number: int) -> None:
        if plan_number != self._plan_number:
            return
        running, steps = self._running, self._planned
        self._done += steps
        if running:
            self._held += len(running) * steps
            self._kv.grow(len(running) * steps)
            self._generated += len(running) * steps
            self._finish_decoded()
        if self._prefilled:
            self._finish_prompts(self._prefilled * steps)
        if self._leaving:
            self._stop_leaving()
        self._plan()

    def _finish_decoded(self) -> None:
        ends, running, done = self._ends, self._running, self._done
        while ends and ends[0][0] <= done:
            step, _, request = heappop(ends)
            if request in running and running[request][0] == step:
                _, tokens = running.pop(request)
                self._held -= tokens
                self._end(request, tokens)

    def _finish_prompts(self, computed: int) -> None:
        """``computed`` prompt tokens are done, the first prompt's first. A prompt that is done gives a token."""
        prompts, done = self._prompts, self._done
        while computed:
            prompt = prompts[0]
            if prompt.left > computed:
                prompt.left -= computed
                return
            computed -= prompt.left
            prompts.popleft()
            request = prompt.request
            request.generated += 1
            if request.first_at < 0:
                request.first_at = self._clock.now
            missing = request.output_tokens - request.generated
            if missing:
                self._running[request] = (done + missing, prompt.tokens + missing)
                self._held += prompt.tokens
                heappush(self._ends, (done + missing, request.number, request))
            else:
                self._end(request, prompt.tokens)

    def _end(self, request: Request, tokens: int) -> None:
        request.generated = request.output_tokens
        self._kv.release(request.blocks, tokens)
        self._listener.finished(request)
