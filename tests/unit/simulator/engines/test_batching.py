"""The engine model beside one that computes every step, and its limits."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from simulator.clock import Clock
from simulator.engines import PROFILES, EngineProfile, engine_factory
from simulator.requests import Request, TraceRequest

PROFILE = EngineProfile(
    name="test", step_s=0.01, prefill_s=1e-5, sequence_s=2e-4, kv_s=1e-7, step_tokens=100, max_seqs=5, kv_tokens=100_000
)


class Listener:
    """Remembers what the engine said, and when."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.ends: dict[int, tuple[float, float]] = {}
        self.refusals: list[int] = []
        self.stopped: list[float] = []

    def started(self, request: Request) -> None:
        if request.started_at < 0:
            request.started_at = self.clock.now

    def finished(self, request: Request) -> None:
        assert request.number not in self.ends
        self.ends[request.number] = (request.first_at, self.clock.now)

    def refused(self, request: Request) -> None:
        self.refusals.append(request.number)


def replayed(profile: EngineProfile, lines: list[TraceRequest]) -> tuple[list[Request], Listener]:
    """What became of ``lines`` on one engine with blocks of 16 tokens."""
    clock = Clock()
    listener = Listener(clock)
    engine = engine_factory(clock, profile, 16, listener)()
    requests = [Request(number, line, line.at_s) for number, line in enumerate(lines)]
    for request in requests:
        clock.at(request.arrived_at, engine.submit, request)
    clock.run()
    return requests, listener


@pytest.mark.parametrize("seed", range(20))
def test_stretches_give_the_times_of_single_steps(seed: int) -> None:
    """First and last token of each request, as when each step is computed by itself."""
    draw = random.Random(seed)
    lines, at_s = [], 0.0
    for _ in range(60):
        at_s += draw.expovariate(3.0)
        lines.append(TraceRequest(at_s, draw.randint(1, 400), draw.choice([1, 2, draw.randint(1, 60)])))
    _, listener = replayed(PROFILE, lines)
    expected = stepwise(PROFILE, lines)
    assert sorted(listener.ends) == list(range(60))
    for number, (first_at, last_at) in expected.items():
        assert listener.ends[number] == (pytest.approx(first_at, abs=1e-6), pytest.approx(last_at, abs=1e-6))


def stepwise(profile: EngineProfile, lines: list[TraceRequest]) -> dict[int, tuple[float, float]]:
    """Time of the first and last token of each request, step by step, with room for all."""
    waiting = list(enumerate(lines))
    prompts: list[list[int]] = []
    decoding: list[list[int]] = []
    firsts: dict[int, float] = {}
    ends: dict[int, tuple[float, float]] = {}
    now = 0.0
    while waiting or prompts or decoding:
        if not prompts and not decoding:
            now = max(now, waiting[0][1].at_s)
        while waiting and waiting[0][1].at_s <= now and len(prompts) + len(decoding) < profile.max_seqs:
            number, line = waiting.pop(0)
            prompts.append([number, line.prompt_tokens])
        held = sum(lines[number].prompt_tokens + done - 1 for number, done in decoding)
        room, computed = profile.step_tokens - len(decoding), 0
        ready = []
        for prompt in prompts:
            chunk = min(prompt[1], room - computed)
            computed += chunk
            prompt[1] -= chunk
            if not prompt[1]:
                ready.append(prompt)
        now += profile.step_s + profile.prefill_s * computed
        now += profile.sequence_s * len(decoding) + profile.kv_s * held
        for sequence in decoding:
            sequence[1] += 1
        for prompt in ready:
            prompts.remove(prompt)
            firsts[prompt[0]] = now
            decoding.append([prompt[0], 1])
        for number, done in decoding[:]:
            if done == lines[number].output_tokens:
                decoding.remove([number, done])
                ends[number] = (firsts[number], now)
    return ends


def test_a_full_cache_has_the_last_sequence_computed_anew() -> None:
    """Every request ends once with all its tokens; what was computed again is counted, and the first loses nothing."""
    tight = replace(PROFILE, kv_tokens=400)
    lines = [TraceRequest(0.0, 100, 150), TraceRequest(0.001, 100, 150), TraceRequest(0.002, 100, 150)]
    requests, listener = replayed(tight, lines)
    assert sorted(listener.ends) == [0, 1, 2]
    assert [request.generated for request in requests] == [150, 150, 150]
    assert requests[0].redone == 0
    assert requests[2].redone > 100
    assert listener.ends[0][1] < listener.ends[1][1] < listener.ends[2][1]


def test_what_never_fits_is_refused() -> None:
    """And holds up nobody."""
    lines = [TraceRequest(0.0, 399, 2), TraceRequest(0.0, 10, 5)]
    _, listener = replayed(replace(PROFILE, kv_tokens=400), lines)
    assert (listener.refusals, list(listener.ends)) == ([0], [1])


def test_a_cached_beginning_is_not_computed() -> None:
    """The second of two equal prompts has its first token sooner by what the cache holds."""
    blocks = tuple(range(20))
    lines = [TraceRequest(0.0, 330, 1, blocks), TraceRequest(10.0, 330, 1, blocks)]
    requests, listener = replayed(replace(PROFILE, kv_s=0.0), lines)
    assert [request.cached for request in requests] == [0, 320]
    assert listener.ends[0][0] == pytest.approx(4 * 0.01 + 330e-5)
    assert listener.ends[1][0] == pytest.approx(10 + 0.01 + 10e-5)


def test_inferqs_simulated_engine() -> None:
    """Its own pace: TTFT, prefill by token, tokens in step with the clock; a request beyond its slots waits."""
    lines = [TraceRequest(0.0, 1000, 11), TraceRequest(0.0, 500, 3)]
    _, listener = replayed(replace(PROFILES["simulated"], max_seqs=1), lines)
    assert listener.ends[0] == (pytest.approx(0.04), pytest.approx(0.14))
    assert listener.ends[1] == (pytest.approx(0.17), pytest.approx(0.19))


def aborted(profile: EngineProfile, lines: list[TraceRequest], number: int, at_s: float) -> tuple[Request, Listener]:
    """What became of ``lines`` where request ``number`` is stopped at ``at_s`` and sent again 10 s later."""
    clock = Clock()
    listener = Listener(clock)
    engine = engine_factory(clock, profile, 16, listener)()
    requests = [Request(place, line, line.at_s) for place, line in enumerate(lines)]
    for request in requests:
        clock.at(request.arrived_at, engine.submit, request)

    def again(request: Request) -> None:
        listener.stopped.append(clock.now)
        clock.at(clock.now + 10, engine.submit, request)

    clock.at(at_s, lambda request: engine.abort(request, again), requests[number])
    clock.run()
    assert sorted(listener.ends) == list(range(len(lines)))
    return requests[number], listener


@pytest.mark.parametrize("profile", [PROFILE, PROFILES["simulated"]], ids=lambda profile: profile.name)
def test_a_stopped_request_goes_on_behind_what_it_has(profile: EngineProfile) -> None:
    """It keeps its first token's time and has all its tokens in the end; what is computed again is counted."""
    lines = [TraceRequest(0.0, 100, 200), TraceRequest(0.0, 50, 20)]
    _, undisturbed = replayed(profile, lines)
    request, listener = aborted(profile, lines, 0, 1.0)
    assert listener.stopped == [pytest.approx(1.0, abs=0.02)]
    assert listener.ends[0][0] == pytest.approx(undisturbed.ends[0][0])
    assert listener.ends[0][1] == pytest.approx(undisturbed.ends[0][1] + 10, abs=0.15)
    assert 150 < request.redone < 300
    assert request.generated == 200


@pytest.mark.parametrize("profile", [PROFILE, PROFILES["simulated"]], ids=lambda profile: profile.name)
def test_a_request_is_stopped_before_its_first_token(profile: EngineProfile) -> None:
    """While its prompt is computed, or while it waits in the engine: its first token is that of the next attempt."""
    lines = [TraceRequest(0.0, 2000, 5), TraceRequest(0.0, 2000, 5)]
    for at_s, slots in ((0.015, 5), (0.0, 1)):
        _, listener = aborted(replace(profile, max_seqs=slots), lines, 1, at_s)
        assert listener.ends[1][0] > 10
        assert listener.ends[0][1] < 1


def test_a_stop_that_comes_late_changes_nothing() -> None:
    """The step under way was its last."""
    _, listener = aborted(PROFILE, [TraceRequest(0.0, 10, 1)], 0, 0.005)
    assert (listener.stopped, list(listener.ends)) == ([], [0])


def test_an_engine_tells_its_load() -> None:
    """What runs, what waits inside, how full the KV cache is, and what was computed anew."""
    clock = Clock()
    engine = engine_factory(clock, replace(PROFILE, max_seqs=2, kv_tokens=400), 16, Listener(clock))()
    for number in range(3):
        clock.at(0.0, engine.submit, Request(number, TraceRequest(0.0, 100, 150), 0.0))
    seen = []
    for at_s in (0.5, 100.0):
        clock.at(at_s, lambda _: seen.append(engine.load()))
    clock.run()
    assert (seen[0].running, seen[0].waiting, seen[0].preemptions) == (2, 1, 0)
    assert seen[0].kv_usage == pytest.approx(0.7, abs=0.1)
    assert (seen[1].running, seen[1].waiting, seen[1].kv_usage) == (0, 0, 0.0)
    assert seen[1].preemptions is not None
    assert seen[1].preemptions > 0
