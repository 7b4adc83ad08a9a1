"""llama.cpp's ``llama-server``, by what it answered itself."""

from __future__ import annotations

import json

import pytest

from scheduling.slots import EngineLoad
from tests.support.engines import ANSWER, FakeLlamacpp, recorded
from tests.support.engines.attached import (
    CHAT,
    COMPLETIONS,
    PATHS,
    answer_of,
    attached,
    check_every_cut,
    rest_of,
    said,
    stream_of,
)
from tests.support.engines.fake import events_of, with_figures
from worker.attempts.continuation_planner import plan_continuation
from worker.engines import NotContinuable
from worker.engines.adapter_calls import AdaptersUnsupported
from worker.engines.dialects import DIALECTS

LLAMACPP = DIALECTS["llamacpp"]
PAGE = recorded("llamacpp", "metrics.txt")


def test_its_metrics_tell_its_load() -> None:
    """Three requests on two slots; the share of the KV cache that is used is told by older versions alone."""
    assert LLAMACPP.read_load(PAGE) == EngineLoad(1, 2)
    assert LLAMACPP.read_load(PAGE + b"llamacpp:kv_cache_usage_ratio 0.25\n") == EngineLoad(1, 2, 0.25)
    assert LLAMACPP.read_load(recorded("llamacpp", "metrics_off.json")) is None
    assert LLAMACPP.read_load(b"vllm:num_requests_waiting 3\n") is None


@pytest.mark.parametrize("value", [float("nan"), -1, float("inf"), 1e7])
def test_an_impossible_number_of_waiting_requests_is_no_load(value: float) -> None:
    """Nothing follows from such a page."""
    assert LLAMACPP.read_load(with_figures(PAGE, {"llamacpp:requests_deferred": value})) is None


def test_progress_moves_with_each_step() -> None:
    """Its counters of tokens stand still during a stream, that of its steps does not; times do not count."""
    assert LLAMACPP.read_progress(PAGE) == LLAMACPP.read_progress(
        with_figures(PAGE, {"llamacpp:predicted_tokens_seconds": 1, "llamacpp:tokens_predicted_seconds_total": 99})
    )
    assert LLAMACPP.read_progress(PAGE) != LLAMACPP.read_progress(with_figures(PAGE, {"llamacpp:n_decode_total": 9999}))
    assert LLAMACPP.read_progress(recorded("llamacpp", "metrics_off.json")) is None


async def test_it_is_known_by_its_own_list() -> None:
    """And not ready while it loads its model."""
    fake = FakeLlamacpp()
    async with attached(fake) as engine:
        assert (engine.dialect.name, engine.models) == ("llamacpp", ("smollm2",))
        assert await engine.load() == EngineLoad(0, 0)
        assert await engine.progress() == await engine.progress()
        fake.loading = True
        assert not await engine.healthy()
        assert not {"/info", "/api/version"} & set(fake.pages)


async def test_without_metrics_its_answers_prove_progress_and_no_load_is_told() -> None:
    """Started without ``--metrics``."""
    async with attached(FakeLlamacpp(metrics=False)) as engine:
        assert await engine.load() is None
        assert await engine.progress() != await engine.progress()


@pytest.mark.parametrize("path", PATHS)
async def test_any_cut_goes_on_as_if_nothing_had_happened(path: str) -> None:
    """Text, finish reason and usage are those of one answer."""
    async with attached(FakeLlamacpp()) as engine:
        await check_every_cut(engine, path)


async def test_a_completion_without_a_limit_fills_the_context() -> None:
    """It has no default of sixteen tokens: a continued answer must not get one."""
    async with attached(FakeLlamacpp()) as engine:
        plan = await plan_continuation(engine, stream_of("smollm2", COMPLETIONS, ANSWER[:9]))
        assert plan.body is not None
        assert "max_tokens" not in json.loads(plan.body)
        whole = said(await answer_of(engine, stream_of("smollm2", COMPLETIONS)))
        assert whole[:2] == (ANSWER, "stop")
        assert said(await rest_of(engine, stream_of("smollm2", COMPLETIONS, ANSWER[:9]))) == (ANSWER[9:], *whole[1:])


async def test_a_chat_on_an_older_version_starts_again() -> None:
    """It would say once more what was delivered; a completion goes on there as well."""
    fake = FakeLlamacpp(knows_continuation=False)
    async with attached(fake) as engine:
        with pytest.raises(NotContinuable, match="repeat"):
            await plan_continuation(engine, stream_of("smollm2", CHAT, ANSWER[:9]))
        await check_every_cut(engine, COMPLETIONS, range(9, 10))


def test_the_recorded_server_repeats_the_prefix_unless_it_is_told_to_continue() -> None:
    """Why the continuation names ``content``."""

    def text(name: str) -> str:
        chunks = events_of(recorded("llamacpp", name))
        return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])

    assert text("chat_repeated.sse") == "Three colours are " + text("chat_continued.sse")


async def test_it_loads_no_adapters() -> None:
    """And is not asked to."""
    fake = FakeLlamacpp()
    async with attached(fake) as engine:
        with pytest.raises(AdaptersUnsupported, match="llamacpp loads no adapters"):
            await engine.load_adapter("tuned", "/tuned")
        assert not any("lora" in path for path in fake.pages)
