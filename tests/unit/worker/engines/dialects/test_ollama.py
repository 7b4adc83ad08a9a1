"""Ollama, by its source and docs."""

from __future__ import annotations

import pytest

from tests.support.engines import ANSWER, FakeOllama
from tests.support.engines.attached import PATHS, attached, stream_of
from worker.attempts.continuation_planner import plan_continuation
from worker.engines import NotContinuable


async def test_it_is_known_by_its_version_page_which_is_its_health() -> None:
    """It has neither ``/health`` nor metrics: they are not asked for once it is known."""
    fake = FakeOllama()
    async with attached(fake) as engine:
        assert engine.dialect.name == "ollama"
        assert engine.models == ("llama3.2:latest", "hf.co/bartowski/Llama-3.2-1B-Instruct-GGUF:latest")
        fake.pages.clear()
        assert await engine.load() is None
        assert await engine.progress() != await engine.progress()
        assert set(fake.pages) == {"/api/version"}


@pytest.mark.parametrize("path", PATHS)
async def test_a_cut_stream_starts_again(path: str) -> None:
    """Nothing of it tells what it makes of a prompt: it is not asked."""
    fake = FakeOllama()
    async with attached(fake) as engine:
        fake.pages.clear()
        with pytest.raises(NotContinuable, match="Ollama"):
            await plan_continuation(engine, stream_of(fake.model, path, ANSWER[:9]))
        assert not fake.asked
        assert not [path for path in fake.pages if "tokenize" in path]
