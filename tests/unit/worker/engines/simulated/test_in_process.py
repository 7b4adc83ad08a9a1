"""The simulated engine behind the engine port: calls, aborts, failures and restarts without a socket."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import pytest

from queue_schemas import EngineFailed, EngineState
from worker.engines import Engine, EngineCall
from worker.engines.simulated import SimulatedEngine, SimulationSettings

INSTANT = SimulationSettings(ttft_ms=0, prefill_us_per_token=0, tokens_per_s=0)
LIMIT_S = 5.0


def _call(**fields: object) -> EngineCall:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return EngineCall("/v1/chat/completions", json.dumps(body).encode())


@asynccontextmanager
async def _running(settings: SimulationSettings) -> AsyncIterator[SimulatedEngine]:
    """An engine that is READY, supervised until the block ends."""
    engine = SimulatedEngine(settings)
    changes = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        supervision = tasks.create_task(engine.run(changes.set))
        await _until(engine, changes, EngineState.READY)
        engine.changes = changes  # type: ignore[attr-defined]
        yield engine
        await engine.stop(1.0)
        supervision.cancel()


async def _until(engine: SimulatedEngine, changes: asyncio.Event, state: EngineState) -> None:
    async with asyncio.timeout(LIMIT_S):
        while engine.state is not state:
            changes.clear()
            await changes.wait()


async def _first_piece(engine: Engine, call: EngineCall) -> bytes:
    async with engine.call(call) as answer:
        async for piece in answer.chunks():
            return piece
    raise AssertionError("nothing came")


async def test_a_plain_call_gives_the_whole_answer() -> None:
    """Head and body of a chat completion arrive together."""
    async with _running(INSTANT) as engine, engine.call(_call()) as answer:
        assert (answer.status, answer.content_type) == (200, "application/json")
        assert json.loads(await answer.read(1 << 20))["choices"][0]["finish_reason"] == "stop"


async def test_preempted_requests_say_what_they_would_have_said() -> None:
    """Streams that outgrow the KV cache together take longer; each text is whole, and nothing is held in the end."""
    roomy = SimulationSettings(ttft_ms=1, tokens_per_s=200)
    tight = replace(roomy, kv_cache_tokens=64, max_model_len=64, block_tokens=4)

    async def chat(engine: Engine, number: int, stream: bool) -> bytes:
        call = _call(model="sim", stream=stream, max_tokens=20, ignore_eos=True, seed=number)
        async with engine.call(call) as answer:
            return (await answer.read(1 << 20)).partition(b'"choices"')[2] if not stream else await answer.read(1 << 20)

    texts = []
    for settings in (roomy, tight):
        async with _running(settings) as engine:
            answers = await asyncio.gather(*(chat(engine, number, number % 2 == 0) for number in range(8)))
            texts.append([re.findall(rb'"content":"([^"]*)"', body) for body in answers])
            load = await engine.load()
            assert load is not None
            assert (load.running, load.waiting, load.kv_usage) == (0, 0, 0.0)
            assert bool(load.preemptions) == (settings is tight)
    assert [b"".join(text) for text in texts[0]] == [b"".join(text) for text in texts[1]]
    assert all(texts[0])


@pytest.mark.parametrize("settings", [INSTANT, SimulationSettings(ttft_ms=1, tokens_per_s=1000)])
async def test_a_streamed_call_gives_events_up_to_the_last(settings: SimulationSettings) -> None:
    """A stream ends with ``[DONE]`` whether its tokens come at once or in time."""
    async with _running(settings) as engine, engine.call(_call(stream=True)) as answer:
        assert answer.content_type.startswith("text/event-stream")
        body = b"".join([piece async for piece in answer.chunks()])
    assert body.endswith(b"data: [DONE]\n\n")


async def test_an_error_is_an_answer_not_an_exception() -> None:
    """An unknown model is a 404 to be passed on."""
    async with _running(INSTANT) as engine, engine.call(_call(model="other")) as answer:
        assert answer.status == 404
        assert json.loads(await answer.read(1 << 20))["error"]["code"] == 404


async def test_base_models_and_adapters_are_listed_once_ready() -> None:
    """Nothing is served before the engine was ready; then adapters are, beside their base."""
    settings = SimulationSettings(models=("base",), adapters=("lora",), start_ms=None)
    engine = SimulatedEngine(settings)
    assert (engine.models, engine.state) == ((), EngineState.STARTING)
    with pytest.raises(EngineFailed):
        async with engine.call(_call()):
            pass
    async with _running(SimulationSettings(models=("base",), adapters=("lora",))) as ready:
        assert ready.models == ("base", "lora")


async def test_an_engine_ordered_never_to_be_ready_stays_so() -> None:
    """Supervision waits on and can be cancelled; the engine never reports progress."""
    engine = SimulatedEngine(SimulationSettings(start_ms=None))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(engine.run(lambda: None), 0.05)
    assert engine.state is EngineState.STARTING
    assert await engine.progress() is None


async def test_leaving_a_stream_early_aborts_it_and_frees_its_slot() -> None:
    """The next request gets the slot of one whose caller left, and the abort is counted."""
    async with _running(SimulationSettings(max_num_seqs=1, tokens_per_s=5, ttft_ms=0)) as engine:
        assert b"assistant" in await _first_piece(engine, _call(stream=True))
        assert (engine.simulation.running, engine.simulation._engine.finished["abort"]) == (0, 1)
        assert await _first_piece(engine, _call(stream=True))


async def test_a_cancelled_plain_call_is_aborted_while_it_waits_for_a_slot() -> None:
    """Giving up in the waiting queue leaves it shorter and takes nobody's slot."""
    async with (
        _running(SimulationSettings(max_num_seqs=1, tokens_per_s=5)) as engine,
        engine.call(_call(stream=True)) as answer,
        aclosing(answer.chunks()) as pieces,
    ):
        await anext(pieces)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), engine.call(_call()):
                pass
        assert (engine.simulation.running, engine.simulation.waiting) == (1, 0)


async def test_progress_changes_with_every_output() -> None:
    """Two looks with output in between differ; without, they are the same."""
    async with _running(SimulationSettings(ttft_ms=0, tokens_per_s=500)) as engine:
        before = await engine.progress()
        async with engine.call(_call(stream=True)) as answer:
            seen = [await engine.progress() async for _ in answer.chunks()]
        assert len({before, *seen}) == len(seen) + 1
        assert await engine.progress() == await engine.progress()


async def test_a_crash_fails_every_call_and_the_engine_starts_again() -> None:
    """One ordered crash breaks the stream beside it too; afterwards the engine answers again."""
    async with _running(SimulationSettings(ttft_ms=0, tokens_per_s=5)) as engine:
        with pytest.raises(EngineFailed):
            async with engine.call(_call(stream=True)) as bystander, aclosing(bystander.chunks()) as pieces:
                await anext(pieces)
                with pytest.raises(EngineFailed):
                    await _first_piece(engine, _call(sim={"fail": "crash"}))
                assert engine.state is EngineState.FAILED
                await anext(pieces)
        await _until(engine, engine.changes, EngineState.READY)  # type: ignore[attr-defined]
        assert engine.restarts == 1
        assert await _first_piece(engine, _call(stream=True))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_connection_closed_too_early_is_an_engine_failure(stream: bool) -> None:
    """Plain or streamed, an answer cut short raises instead of looking complete."""
    async with _running(INSTANT) as engine:
        with pytest.raises(EngineFailed):
            async with engine.call(_call(stream=stream, sim={"fail": "close_midstream", "after_tokens": 2})) as answer:
                await answer.read(1 << 20)


async def test_an_ordered_error_is_an_answer_and_in_a_stream_an_event() -> None:
    """Before the first token the status tells; after it an error event does."""
    async with _running(INSTANT) as engine:
        async with engine.call(_call(sim={"fail": 503})) as answer:
            assert answer.status == 503
        async with engine.call(_call(stream=True, sim={"fail": "500", "after_tokens": 2})) as answer:
            body = await answer.read(1 << 20)
        assert (answer.status, body.count(b'"error"')) == (200, 1)


async def test_an_order_may_be_for_one_engine_and_for_a_number_of_times() -> None:
    """``on`` names the engine that fails and ``times`` how often, so that a retry succeeds."""
    async with _running(INSTANT) as engine:
        for sim, statuses in (
            ({"fail": 500, "times": 2}, [500, 500, 200]),
            ({"fail": 500, "on": "other"}, [200]),
            ({"fail": 500, "on": "sim"}, [500]),
        ):
            for status in statuses:
                async with engine.call(_call(sim=sim)) as answer:
                    assert answer.status == status


async def test_a_hanging_request_ends_when_its_caller_leaves() -> None:
    """A hang holds its slot until the call is cancelled."""
    async with _running(INSTANT) as engine:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), engine.call(_call(sim={"fail": "hang"})):
                pass
        assert (engine.simulation.running, engine.simulation._engine.finished["abort"]) == (0, 1)


async def test_a_slow_request_takes_its_delay_per_token() -> None:
    """Each token of a slow request takes at least the ordered time, whatever the engine's pace."""
    loop = asyncio.get_running_loop()
    async with _running(INSTANT) as engine:
        begun = loop.time()
        async with engine.call(_call(max_tokens=3, sim={"fail": "slow", "delay_ms": 20})) as answer:
            assert answer.status == 200
        assert loop.time() - begun >= 0.06


async def test_a_stopped_engine_fails_what_still_runs() -> None:
    """Nothing waits for an engine that was told to stop."""
    async with _running(SimulationSettings(tokens_per_s=5)) as engine:
        with pytest.raises(EngineFailed):
            async with engine.call(_call(stream=True)) as answer:
                async for _ in answer.chunks():
                    await engine.stop(1.0)
