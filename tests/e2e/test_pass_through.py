"""What reaches an engine: inference requests as the client sent them, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer
from yarl import URL

from openai_api.paths import INFERENCE_PATHS
from tests.support.fleet import MODEL, Fleet
from tests.support.servers import Server

pytestmark = pytest.mark.asyncio(loop_scope="module")

RECORDED = "recorded"
FORM_PATH = "/v1/audio/transcriptions"
ENGINE_KEY, CLIENT_KEY = "sk-of-the-engine", "sk-of-the-client"
ANSWER_TYPE = "application/json; echo=1"
LOOKED_AT = {"/health", "/v1/models", "/metrics"}
"""Pages of an engine that its worker itself looks at."""
OWN_PAGES = ("/metrics", "/health", "/ping", "/version", "/load")
"""What an engine serves too, and the Router answers of itself."""
CONTROL_PATHS = (
    "/sleep",
    "/wake_up",
    "/is_sleeping",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/collective_rpc",
    "/reset_prefix_cache",
    "/reset_mm_cache",
    "/start_profile",
    "/update_weights",
    "/server_info",
    "/load",
    "/version",
    "/ping",
    "/invocations",
    "/health",
    "/metrics",
    "/%73leep",
    "//sleep",
    "/sleep/",
    "/v1/chat/completions/../../../sleep",
    "/v1/chat/completions/%2e%2e/%2e%2e/%2e%2e/sleep",
    "/v1/chat/completions%2f..%2f..%2f..%2fsleep",
    "/v1/chat/completions/../../load_lora_adapter",
    "/v1/chat/completions/",
)


@dataclass
class RecordingEngine:
    """Answers every path with what it was sent; ``seen`` keeps method, path, authorization and size of body of each."""

    seen: list[tuple[str, str, str, int]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    """Of the last request for inference."""

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        path = request.raw_path
        self.seen.append((request.method, path, request.headers.get("authorization", ""), len(body)))
        if request.method == "GET" and path == "/v1/models":
            return web.json_response({"object": "list", "data": [{"id": RECORDED, "object": "model"}]})
        if request.method == "GET" and path == "/health":
            return web.Response()
        self.headers = {name.lower(): value for name, value in request.headers.items()}
        if "wants-embeddings" in self.headers.get("openai-beta", ""):
            told = {"metadata": '{"data": [{"start": 0}]}', "set-cookie": "a=b", "x-engine": "1", "keep-alive": "9"}
            return web.Response(body=b"\x00\xff" * 8, content_type="application/octet-stream", headers=told)
        if "wants-refusal" in self.headers.get("openai-beta", ""):
            return web.json_response({"error": {"message": "slow down"}}, status=429, headers={"retry-after": "17"})
        echo = {
            "method": request.method,
            "path": path,
            "content_type": request.headers.get("content-type", ""),
            "sha256": hashlib.sha256(body).hexdigest(),
        }
        return web.Response(body=json.dumps(echo).encode(), headers={"content-type": ANSWER_TYPE})

    @property
    def asked(self) -> list[tuple[str, str, str, int]]:
        """What is no look of the worker's own."""
        return [one for one in self.seen if not (one[0] == "GET" and one[1] in LOOKED_AT and one[3] == 0)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[tuple[RecordingEngine, str]]:
    """The recording engine and where it listens."""
    recorder = RecordingEngine()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", recorder.answer)
    async with TestServer(app, host="127.0.0.1") as server:
        yield recorder, str(server.make_url("/"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(
    module_valkey: Server, tmp_path_factory: pytest.TempPathFactory, engine: tuple[RecordingEngine, str]
) -> AsyncIterator[Fleet]:
    """One worker attached to the recording engine, which wants a key of its own; beside it one with an adapter, and one
    of the same base model without."""
    env = {"INFERQ_WORKER_ENGINE_API_KEY": ENGINE_KEY}
    async with Fleet(tmp_path_factory.mktemp("fleet"), module_valkey, env=env) as fleet:
        await fleet.up(workers=1)
        await fleet.worker("recorder", engine="url", engine_url=engine[1], model="unused").start()
        await fleet.worker("adapted", sim_adapter="tuned-lora").start()
        await fleet.until_served(1, RECORDED)
        await fleet.until_served(2, MODEL)
        await fleet.until_served(1, "tuned-lora")
        yield fleet


def _request(path: str) -> tuple[bytes, str]:
    """A body that any re-encoding would change, and its content type."""
    if path == FORM_PATH:
        sound = bytes(range(256)) * 64
        head = f'--Aa1\r\ncontent-disposition: form-data; name="model"\r\n\r\n{RECORDED}\r\n'
        file = (
            '--Aa1\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\ncontent-type: audio/wav\r\n\r\n'
        )
        return head.encode() + file.encode() + sound + b"\r\n--Aa1--\r\n", 'multipart/form-data; boundary="Aa1"; x=1'
    body = f'{{ "zeta":1.50, "model" : "{RECORDED}",\n\t"text":"\\u00e9 \u00e9", "big":123456789012345678901 }}  '
    return body.encode(), "application/json; charset=utf-8"


@pytest.mark.parametrize("path", INFERENCE_PATHS)
async def test_an_inference_path_reaches_the_engine_untouched(
    fleet: Fleet, engine: tuple[RecordingEngine, str], path: str
) -> None:
    """Path, content type and each byte of the body arrive; status, content type and body of the answer come back; the
    client's key stays at the Router."""
    body, content_type = _request(path)
    headers = {"content-type": content_type, "authorization": f"Bearer {CLIENT_KEY}"}
    before = len(engine[0].asked)
    async with fleet.session.post(fleet.router.url + path, data=body, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        assert answer.headers["content-type"] == ANSWER_TYPE
        echo = json.loads(await answer.read())
    assert echo == {
        "method": "POST",
        "path": path,
        "content_type": content_type,
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    assert engine[0].asked[before:] == [("POST", path, f"Bearer {ENGINE_KEY}", len(body))]


@pytest.mark.parametrize("key", ["", "once-for-headers"])
async def test_headers_on_the_lists_pass_both_ways(fleet: Fleet, engine: tuple[RecordingEngine, str], key: str) -> None:
    """[C7] The engine sees the trace and the API's version; the client gets ``metadata``, and no cookie; a kept answer
    has it too, whenever it is asked for again."""
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    sent = {
        "traceparent": trace, "tracestate": "vendor=1,other=2", "openai-beta": "wants-embeddings",
        "anthropic-version": "2023-06-01", "baggage": "user=7", "cookie": "c=1", "content-type": "application/json",
    }  # fmt: skip
    for again in (False, True) if key else (False,):
        headers = sent | ({"idempotency-key": key} if key else {})
        body = json.dumps({"model": RECORDED, "input": "hi"})
        async with fleet.session.post(f"{fleet.router.url}/v1/embeddings", data=body, headers=headers) as answer:
            assert (answer.status, await answer.read()) == (200, b"\x00\xff" * 8)
            assert answer.headers["metadata"] == '{"data": [{"start": 0}]}'
            assert not {"set-cookie", "x-engine", "keep-alive"} & {name.lower() for name in answer.headers}
            assert ("x-inferq-idempotent-replay" in answer.headers) is again
    seen = engine[0].headers
    assert {name: seen.get(name) for name in ("traceparent", "tracestate", "anthropic-version")} == {
        "traceparent": trace, "tracestate": "vendor=1,other=2", "anthropic-version": "2023-06-01",
    }  # fmt: skip
    assert not {"baggage", "cookie"} & seen.keys()


async def test_an_engines_retry_after_reaches_the_client(fleet: Fleet) -> None:
    """[C7] As the engine said it, on its own answer."""
    headers = {"openai-beta": "wants-refusal", "content-type": "application/json"}
    body = json.dumps({"model": RECORDED, "messages": []})
    async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", data=body, headers=headers) as answer:
        assert (answer.status, answer.headers["retry-after"]) == (429, "17")


@pytest.mark.parametrize("path", CONTROL_PATHS)
async def test_a_control_path_never_reaches_the_engine(
    fleet: Fleet, engine: tuple[RecordingEngine, str], path: str
) -> None:
    """Whatever the method and however the path is spelled: the Router itself answers."""
    before = len(engine[0].asked)
    body, content_type = _request("/v1/chat/completions")
    url = URL(fleet.router.url + path, encoded=True)
    for method in ("POST", "GET", "PUT", "DELETE"):
        sent = body if method in ("POST", "PUT") else None
        headers = {"content-type": content_type} if sent else {}
        async with fleet.session.request(method, url, data=sent, headers=headers) as answer:
            own_page = path in OWN_PAGES and (method == "GET" or (method, path) == ("POST", "/ping"))
            assert answer.status in ((200,) if own_page else (404, 405)), (method, await answer.text())
            assert answer.headers.get("content-type") != ANSWER_TYPE
    assert engine[0].asked[before:] == []


async def test_an_adapter_is_a_model_of_its_own(fleet: Fleet) -> None:
    """A LoRA adapter that an engine lists is asked for by its name, listed beside its base model, and only asked of
    workers that have it."""
    listed = [model["id"] for model in (await fleet.router.page("/v1/models"))["data"]]
    assert sorted(listed) == sorted([MODEL, RECORDED, "tuned-lora"])
    assert (await fleet.router.page("/v1/models/tuned-lora"))["id"] == "tuned-lora"
    for model in ("tuned-lora", MODEL) * 6:
        body = {"model": model, "messages": [{"role": "user", "content": f"to {model}"}]}
        async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body) as answer:
            said = await answer.json()
            assert answer.status == 200, said
        assert (said["model"], said["choices"][0]["message"]["content"]) == (model, f"to {model}")
    adapter = await fleet.router.page("/v1/models/tuned-lora")
    assert (adapter["parent"], adapter["root"], type(adapter["max_model_len"])) == (MODEL, "tuned-lora", int)
    workers = {
        worker["worker_id"]: worker["models"] for worker in (await fleet.router.page("/fabric/v1/workers"))["workers"]
    }
    assert {name for name, models in workers.items() if "tuned-lora" in models} == {"adapted"}
