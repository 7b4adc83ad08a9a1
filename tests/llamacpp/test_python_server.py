"""llama-cpp-python's server: a server that is not known, which runs one request at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from queue_schemas import CONTINUED
from tests.integration.worker.fleet import Client, LocalFleet
from tests.support.engines.attached import CHAT, engine_at, stream_of
from worker.attempts.continuation_planner import plan_continuation
from worker.engines import NotContinuable

from .conftest import MODEL, python_server, until_ready
from .environment import LlamacppEnvironment

pytestmark = [pytest.mark.llamacpp, pytest.mark.timeout(3600)]


async def test_it_is_served_as_a_server_that_is_not_known(
    llamacpp: LlamacppEnvironment, fleet_and_client: tuple[LocalFleet, Client], tmp_path: Path
) -> None:
    """Chats are answered; a cut stream starts again; slots stay, for it tells no load."""
    fleet, client = fleet_and_client
    with python_server(llamacpp, tmp_path) as url:
        async with engine_at(url) as engine:
            assert (engine.dialect.name, engine.models) == ("openai", (MODEL,))
            assert await engine.load() is None
            assert await engine.progress() != await engine.progress()
            with pytest.raises(NotContinuable, match="/tokenize answers 404"):
                await plan_continuation(engine, stream_of(MODEL, CHAT, "Once"))
        await until_ready(fleet, client, url, "--slots", "1")
        plain = await client.ask(model=MODEL, max_tokens=8)
        assert json.loads(plain.body)["choices"][0]["message"]["content"]
        streamed = await client.ask(model=MODEL, stream=True, max_tokens=8, prefix="Three colours are ")
        assert (streamed.status, streamed.frames[0].flags & CONTINUED) == (200, 0)
        assert streamed.body.endswith(b"data: [DONE]\n\n")
