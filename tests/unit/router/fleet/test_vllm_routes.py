"""The pages of a Router that vLLM's server has, too, and the inference paths of vLLM."""

from __future__ import annotations

import asyncio

import anthropic
import httpx2
import pytest

from openai_api.paths import INFERENCE_PATHS
from queue_schemas import MarkerKind
from tests.unit.router.fakes import Client, FakeQueue, router

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")])
async def test_health_is_the_routers_own(method: str, path: str) -> None:
    """[F1] 200 without a body while requests are served; 503, with when to come again, before and after; no key."""
    async with router(FakeQueue("m"), api_keys="0" * 64 + ":acme", lame_duck_ms=0) as app:
        client = Client(app)
        well = await client.request(method, path)
        app.services.lifecycle.leaving = True
        leaving = await client.request(method, path)
    assert (well.status, well.body) == (200, b"")
    assert (leaving.status, leaving.error["code"]) == (503, "shutting_down")
    async with router() as app:
        away = await Client(app).request(method, path)
    assert (away.status, away.error["code"], "retry-after" in away.headers) == (503, "broker_unavailable", True)


async def test_version_and_load_are_shown() -> None:
    """[F1] The version of inferq, and how many requests the Router serves."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        client = Client(app)
        assert (await client.request("GET", "/version")).json()["version"]
        assert (await client.request("GET", "/load")).json() == {"server_load": 0}
        answer = client.post(CHAT)
        job = await queue.job()
        assert (await client.request("GET", "/load")).json() == {"server_load": 1}
        queue.mark(job, MarkerKind.CANCELLED)
        await answer.done()


@pytest.mark.parametrize(
    "path",
    [
        *("/rerank", "/v1/rerank", "/v2/rerank", "/score", "/v1/score", "/pooling", "/classify", "/v2/embed"),
        *("/v1/messages/count_tokens", "/tokenize", "/detokenize"),
    ],
)
async def test_the_inference_paths_of_vllm_are_built_in(path: str) -> None:
    """[F2] The body reaches an engine on that path as it is."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(b'{"model": "m",  "odd": 1}', path)
        job = await queue.job()
        assert (job.path, job.body) == (path, b'{"model": "m",  "odd": 1}')
        queue.answer(job, b'{"ok": 1}')
        assert (await answer.done()).status == 200
    assert path in INFERENCE_PATHS


async def test_recordings_are_translated() -> None:
    """[F2] A form on its way to ``/v1/audio/translations``."""
    queue = FakeQueue("m")
    form = b'--B\r\ncontent-disposition: form-data; name="model"\r\n\r\nm\r\n--B--\r\n'
    async with router(queue) as app:
        headers = {"content-type": "multipart/form-data; boundary=B"}
        answer = Client(app).post(form, "/v1/audio/translations", headers)
        job = await queue.job()
        queue.answer(job, b'{"text": "x"}')
        assert (await answer.done()).json() == {"text": "x"}
    assert (job.path, job.body) == ("/v1/audio/translations", form)


async def test_an_unmodified_sdk_counts_tokens() -> None:
    """[F2] ``client.messages.count_tokens`` of the anthropic package."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport) as http:
            client = anthropic.AsyncAnthropic(base_url="http://127.0.0.1", api_key="k", http_client=http, max_retries=0)
            messages: list[anthropic.types.MessageParam] = [{"role": "user", "content": "hi"}]
            counting = asyncio.create_task(client.messages.count_tokens(model="m", messages=messages))
            job = await queue.job()
            queue.answer(job, b'{"input_tokens": 7}')
            assert (await counting).input_tokens == 7
    assert job.path == "/v1/messages/count_tokens"


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/images/generations"), ("POST", "/generate"), ("GET", "/x")])
async def test_an_unknown_path_says_how_one_is_allowed(method: str, path: str) -> None:
    """[F2] 404 that names the setting."""
    async with router(FakeQueue("m")) as app:
        answer = await Client(app).request(method, path, b"{}")
    assert (answer.status, answer.error["code"]) == (404, "unknown_path")
    assert "INFERQ_ROUTER_EXTRA_PATHS" in answer.error["message"]
