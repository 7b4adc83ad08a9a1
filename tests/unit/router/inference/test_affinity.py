"""What a Router says of a request's prefix, for the queue to find a worker that holds it."""

from __future__ import annotations

from typing import Any

import pytest

from queue_schemas import WorkerInfo
from scheduling.affinity import adapter_digest, prefix_digests
from tests.unit.router.fakes import Client, FakeQueue, router, worker

LONG = {"model": "m", "messages": [{"role": "system", "content": "You answer in one word. " * 200}]}
SHORT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


async def affinity_of(
    request: dict[str, Any],
    path: str = "/v1/chat/completions",
    headers: dict[str, str] | None = None,
    info: WorkerInfo | None = None,
    **settings: Any,
) -> str:
    queue = FakeQueue("m")
    queue.workers = {"w1": info or worker("m")}
    async with router(queue, **settings) as app:
        answer = Client(app).post(request, path, headers or {})
        job = await queue.job()
        queue.answer(job, b"{}")
        await answer.done()
    return job.affinity


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"temperature": 0.1, "priority": 3}])
async def test_a_job_carries_the_digests_of_its_prefix(fields: dict[str, Any]) -> None:
    """Of its tenant and model, whatever else the request says."""
    assert await affinity_of(LONG | fields) == prefix_digests("default", "m", LONG) != ""


@pytest.mark.parametrize("responses", ["chat", "engine"])
async def test_a_response_has_them_in_either_form(responses: str) -> None:
    """Those of the request as it came, so that the next turn knows them."""
    request = {"model": "m", "input": "Say it again. " * 300}
    assert await affinity_of(request, "/v1/responses", responses=responses) == prefix_digests("default", "m", request)


async def test_a_session_is_named_by_a_header_or_a_field() -> None:
    """Also with a prompt that is too short to matter by itself."""
    by_header = await affinity_of(SHORT, headers={"x-session-id": "talk-1"})
    assert by_header == prefix_digests("default", "m", SHORT, "talk-1") != ""
    assert await affinity_of(SHORT | {"prompt_cache_key": "talk-1"}) == by_header


async def test_a_short_prompt_has_none() -> None:
    assert await affinity_of(SHORT) == ""


async def test_an_adapter_is_worth_finding_by_itself() -> None:
    """The engine's model card says what is an adapter."""
    info = worker("m").model_copy(update={"cards": {"m": {"parent": "base"}}})
    assert await affinity_of(SHORT, info=info) == adapter_digest("m")
    assert (await affinity_of(LONG, info=info)).endswith(adapter_digest("m"))


async def test_a_setting_switches_it_off() -> None:
    info = worker("m").model_copy(update={"cards": {"m": {"parent": "base"}}})
    assert await affinity_of(LONG, headers={"x-session-id": "talk-1"}, info=info, affinity=False) == ""
