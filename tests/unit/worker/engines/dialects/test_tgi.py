"""text-generation-inference, by its source and docs."""

from __future__ import annotations

import pytest

from scheduling.slots import EngineLoad
from tests.support.engines import ANSWER, FakeTgi, recorded
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
from tests.support.engines.fake import with_figures
from tests.support.waiting import eventually
from worker.attempts.continuation_planner import plan_continuation
from worker.engines import EngineCall, NotContinuable
from worker.engines.dialects import DIALECTS

TGI = DIALECTS["tgi"]
PAGE = recorded("tgi", "metrics.txt")


def test_its_metrics_tell_its_load() -> None:
    """No KV usage among them; histograms of similar names are something else."""
    assert TGI.read_load(PAGE) == EngineLoad(2, 6)
    assert TGI.read_load(b"") is None
    assert TGI.read_load(with_figures(PAGE, {"tgi_queue_size": float("nan")})) is None


def test_progress_moves_with_each_step() -> None:
    """Prefill and decode are counted apart."""
    step = PAGE.replace(b'{method="decode"} 1203', b'{method="decode"} 1204')
    assert TGI.read_progress(step) != TGI.read_progress(PAGE)
    assert TGI.read_progress(with_figures(PAGE, {"tgi_queue_size": 9})) == TGI.read_progress(PAGE)
    assert TGI.read_progress(b"") is None


async def test_it_is_known_by_its_router_and_unwell_when_its_model_is() -> None:
    """Its list alone proves nothing: it names the model as the owner."""
    fake = FakeTgi()
    async with attached(fake) as engine:
        assert engine.dialect.name == "tgi"
        assert "/info" in fake.pages
        fake.loading = True
        assert not await engine.healthy()


async def test_its_load_is_read_although_it_told_none_before_its_first_request() -> None:
    """Its figures appear when they are first set."""
    fake = FakeTgi()
    async with attached(fake) as engine:
        assert await engine.load() is None
        async with engine.call(EngineCall(CHAT, stream_of(fake.model).body)) as answer:
            await eventually(lambda: fake.running == 1, "it works")
            assert await engine.load() == EngineLoad(0, 1)
            await answer.read(1 << 20)


@pytest.mark.parametrize("path", PATHS)
async def test_any_cut_goes_on_as_if_nothing_had_happened(path: str) -> None:
    """Where the text does not end in white space."""
    async with attached(FakeTgi()) as engine:
        cuts = [cut for cut in range(4, len(ANSWER), 24) if not ANSWER[:cut].endswith(" ")]
        for cut in cuts:
            await check_every_cut(engine, path, range(cut, cut + 1))


async def test_a_chat_that_was_cut_behind_white_space_starts_again() -> None:
    """Its template cuts that off, and another one would follow. A completion's prompt stays as it is."""
    fake = FakeTgi()
    async with attached(fake) as engine:
        with pytest.raises(NotContinuable, match="would not be the original one"):
            await plan_continuation(engine, stream_of(fake.model, CHAT, "Once "))
        await check_every_cut(engine, COMPLETIONS, range(5, 6))


async def test_a_completion_without_a_limit_fills_the_context() -> None:
    """It has no default of sixteen tokens."""
    fake = FakeTgi()
    async with attached(fake) as engine:
        whole = said(await answer_of(engine, stream_of(fake.model, COMPLETIONS)))
        assert said(await rest_of(engine, stream_of(fake.model, COMPLETIONS, ANSWER[:9]))) == (ANSWER[9:], *whole[1:])
