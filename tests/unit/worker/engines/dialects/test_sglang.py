"""SGLang, by its source and docs."""

from __future__ import annotations

from typing import Any

import pytest

from scheduling.slots import EngineLoad
from tests.support.engines import ANSWER, FakeSglang, recorded
from tests.support.engines.attached import CHAT, COMPLETIONS, PATHS, attached, check_every_cut, stream_of
from tests.support.engines.fake import with_figures
from tests.support.waiting import eventually
from worker.attempts.continuation_planner import plan_continuation
from worker.engines import EngineCall, NotContinuable
from worker.engines.dialects import DIALECTS

SGLANG = DIALECTS["sglang"]
PAGE = recorded("sglang", "metrics.txt")


def test_its_metrics_tell_its_load() -> None:
    """Ranks of data parallelism are added up; of their KV caches the fullest counts."""
    assert SGLANG.read_load(PAGE) == EngineLoad(7, 16, 0.28, 3)
    other = PAGE.replace(b'tp_rank="0"', b'dp_rank="1",tp_rank="0"').replace(b" 0.28\n", b" 0.5\n")
    assert SGLANG.read_load(PAGE + other) == EngineLoad(14, 32, 0.5, 6)
    assert SGLANG.read_load(b"") is None
    assert SGLANG.read_load(with_figures(PAGE, {"sglang:num_queue_reqs": -1})) is None
    assert SGLANG.read_load(with_figures(PAGE, {"sglang:token_usage": 45})) == EngineLoad(7, 16, None, 3)


@pytest.mark.parametrize(
    "name", ["num_used_tokens", "gen_throughput", "realtime_tokens_total", "generation_tokens_total"]
)
def test_progress_moves_while_it_works(name: str) -> None:
    """Its counters of tokens move when a request ends, the figures of its log interval before."""
    assert SGLANG.read_progress(PAGE) != SGLANG.read_progress(with_figures(PAGE, {f"sglang:{name}": 1}))
    assert SGLANG.read_progress(with_figures(PAGE, {"sglang:cache_hit_rate": 0.9})) == SGLANG.read_progress(PAGE)
    assert SGLANG.read_progress(b"") is None


async def test_it_is_known_by_its_own_list_and_unwell_while_it_starts() -> None:
    """``owned_by`` is a constant of SGLang."""
    fake = FakeSglang()
    async with attached(fake) as engine:
        assert engine.dialect.name == "sglang"
        assert await engine.healthy()
        fake.loading = True
        assert not await engine.healthy()


async def test_its_load_is_read_although_it_told_none_before_its_first_request() -> None:
    """Its gauges appear with the first work."""
    fake = FakeSglang()
    async with attached(fake) as engine:
        assert await engine.load() is None
        async with engine.call(EngineCall(CHAT, stream_of(fake.model).body)) as answer:
            await eventually(lambda: fake.running == 1, "it works")
            load = await engine.load()
            assert load is not None
            assert (load.waiting, load.running) == (0, 1)
            await answer.read(1 << 20)


async def test_without_metrics_its_answers_prove_progress() -> None:
    """Started without ``--enable-metrics``."""
    async with attached(FakeSglang(metrics=False)) as engine:
        assert await engine.load() is None
        assert await engine.progress() != await engine.progress()


@pytest.mark.parametrize("path", PATHS)
async def test_any_cut_goes_on_as_if_nothing_had_happened(path: str) -> None:
    """Special tokens are among the text that proves it."""
    async with attached(FakeSglang()) as engine:
        await check_every_cut(engine, path)


class Thinking(FakeSglang):
    """Its template puts a special token in front of an answer that begins, and not of one that goes on."""

    def chat_prompt(self, body: dict[str, Any]) -> str:
        prompt = super().chat_prompt(body)
        return prompt if body.get("continue_final_message") else f"{prompt}<s>"


async def test_special_tokens_count_as_text() -> None:
    """Left out, as they are by default, they would hide what a template puts in front of an answer."""
    fake = Thinking()
    async with attached(fake) as engine:
        with pytest.raises(NotContinuable, match="would not be the original one"):
            await plan_continuation(engine, stream_of(fake.model, CHAT, ANSWER[:9]))


async def test_a_chat_on_an_older_version_starts_again() -> None:
    """One that tokenizes no chats; a completion goes on there as well."""
    fake = FakeSglang(tokenizes_chats=False)
    async with attached(fake) as engine:
        with pytest.raises(NotContinuable, match="/tokenize answers 400"):
            await plan_continuation(engine, stream_of(fake.model, CHAT, ANSWER[:9]))
        await check_every_cut(engine, COMPLETIONS, range(9, 10))


async def test_it_loads_adapters_on_paths_of_its_own() -> None:
    """With vLLM's fields."""
    fake = FakeSglang()
    async with attached(fake) as engine:
        await engine.load_adapter("tuned", "/tuned")
        assert engine.models == (fake.model, "tuned")
        await engine.unload_adapter("tuned")
        assert engine.models == (fake.model,)
        assert {"/load_lora_adapter", "/unload_lora_adapter"} <= set(fake.pages)
