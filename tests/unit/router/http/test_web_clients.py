"""What the Router tells web pages, probes and clients of any method: CORS, HEAD, OPTIONS, Allow; and its own paths."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from fastapi import FastAPI

from queue_schemas import CannotStart
from queue_schemas.headers import CLIENT_HEADERS
from router import RouterSettings, build_router
from router.http.extra_paths import check_extra_paths
from telemetry.http.access import declared
from tests.unit.router.fakes import SSE, Client, FakeQueue, router

PAGE = "https://app.example.com"
CHAT = {"model": "m", "messages": []}
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang",
}
KEYS = f"{hashlib.sha256(b'sk-1').hexdigest()}:acme"


async def test_pages_of_allowed_origins_may_call_and_read() -> None:
    """[B8] The preflight is answered without a key; answers, errors and streams say that the page may read them."""
    queue = FakeQueue("m")
    async with router(queue, cors_allow_origins=[PAGE], api_keys=KEYS) as app:
        for path in ("/v1/chat/completions", "/v1/models", "/v1/files"):
            preflight = await Client(app).request("OPTIONS", path, headers=PREFLIGHT)
            assert preflight.status == 200
            assert preflight.headers["access-control-allow-origin"] == PAGE
            assert "POST" in preflight.headers["access-control-allow-methods"]
            assert preflight.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]
        given = {"origin": PAGE, "authorization": "Bearer sk-1"}
        streamed = Client(app).post(CHAT | {"stream": True}, headers=given)
        queue.stream(await queue.job(), b"data: [DONE]\n\n")
        answers = [
            (200, await streamed.done()),
            (401, await Client(app).post(CHAT, headers={"origin": PAGE}).done()),
            (400, await Client(app).post(b"{", headers=given).done()),
            (404, await Client(app).request("GET", "/nowhere", headers=given)),
            (405, await Client(app).request("GET", "/v1/chat/completions", headers=given)),
            (200, await Client(app).request("GET", "/v1/models", headers=given)),
        ]
    for status, answer in answers:
        assert answer.status == status
        assert answer.headers["access-control-allow-origin"] == PAGE
        exposed = set(answer.headers["access-control-expose-headers"].split(", "))
        assert {"x-request-id", "request-id"} | CLIENT_HEADERS <= exposed
        assert "origin" in answer.headers["vary"].lower()
    assert answers[0][1].headers["content-type"] == SSE


@pytest.mark.parametrize(("allowed", "said"), [([], ""), ([PAGE], ""), (["*"], "*")])
async def test_other_origins_get_no_cors_headers(allowed: list[str], said: str) -> None:
    """[B8] Without the setting, or for an origin that is not in it, no answer allows anything; * allows all."""
    given = {"origin": "https://other.example", "authorization": "Bearer sk-1"}
    async with router(FakeQueue("m"), cors_allow_origins=allowed, api_keys=KEYS) as app:
        answer = await Client(app).request("GET", "/v1/models", headers=given)
        preflight = await Client(app).request("OPTIONS", "/v1/models", headers=PREFLIGHT | {"origin": "https://o.e"})
    assert answer.status == 200
    assert answer.headers.get("access-control-allow-origin", "") == said
    assert preflight.headers.get("access-control-allow-origin", "") == said


async def test_without_keys_only_pages_of_allowed_origins_are_let_in() -> None:
    """[B8] A Router without keys answers them, and refuses pages of other origins whatever they ask."""
    async with router(FakeQueue("m"), cors_allow_origins=[PAGE]) as app:
        for origin, status in ((PAGE, 200), ("https://other.example", 403)):
            headers = {"origin": origin, "host": "127.0.0.1:18000"}
            answer = await Client(app).request("GET", "/v1/models", headers=headers)
            assert answer.status == status
            assert ("access-control-allow-origin" in answer.headers) == (status == 200)


@pytest.mark.parametrize("origin", ["app.example.com", "https://app.example.com/", "https://a/b", "https://a b", ""])
def test_an_origin_is_scheme_and_host(origin: str) -> None:
    """[B8] What no browser sends is refused at the start, not never matched."""
    with pytest.raises(CannotStart, match="is not an origin: write scheme and host"):
        RouterSettings.load(cors_allow_origins=[origin])


async def test_head_is_answered_wherever_get_is() -> None:
    """[B8] The same status and headers as for GET, and no body."""
    async with router(FakeQueue("m")) as app:
        for path in (
            "/v1/models",
            "/v1/models/m",
            "/healthz",
            "/readyz",
            "/metrics",
            "/openapi.json",
            "/v1/jobs",
            "/no",
        ):
            got = await Client(app).request("GET", path)
            head = await Client(app).request("HEAD", path)
            assert (head.status, head.complete) == (got.status, True)
            assert head.headers["content-type"] == got.headers["content-type"]
            if path != "/metrics":
                assert head.headers["content-length"] == str(len(got.body))
            assert head.body == b""
            assert "x-request-id" in head.headers


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/v1/files", "GET, HEAD, OPTIONS, POST"),
        ("/v1/files/file-1", "DELETE, GET, HEAD, OPTIONS"),
        ("/v1/webhook_endpoints", "GET, HEAD, OPTIONS, POST"),
        ("/fabric/v1/workers", "GET, HEAD, OPTIONS, POST"),
        ("/v1/chat/completions", "OPTIONS, POST"),
        ("/v1/responses", "OPTIONS, POST"),
        ("/healthz", "GET, HEAD, OPTIONS"),
    ],
)
async def test_allow_names_every_method(path: str, methods: str) -> None:
    """[B8] A 405 and the answer to OPTIONS say all that the path answers."""
    async with router(FakeQueue("m")) as app:
        wrong = await Client(app).request("PUT", path)
        options = await Client(app).request("OPTIONS", path)
        nowhere = await Client(app).request("OPTIONS", "/nowhere")
    assert (wrong.status, wrong.error["code"], wrong.headers["allow"]) == (405, "method_not_allowed", methods)
    assert (options.status, options.headers["allow"], options.body) == (204, methods, b"")
    assert nowhere.status == 404


async def no_queue() -> Any:
    raise AssertionError("nothing runs")


@pytest.fixture(scope="module")
def web_app() -> FastAPI:
    """The FastAPI app of a Router."""
    return build_router(RouterSettings(), open_queue=no_queue)._web_app


def test_extra_paths_cannot_shadow_the_routers_own(web_app: FastAPI) -> None:
    """[B10] Whatever the Router answers itself, or lies above or below it, is refused with a sentence."""
    own = ["/docs", "/openapi.json", "/v1", "/fabric", "/fabric/v1", "/v1/responses", "/V1/Models/x"]
    for template in {route.path for route in declared(web_app)}:
        plain = template.replace("{", "").replace("}", "").removesuffix("/")
        own += [plain, plain.upper(), f"{plain}/more"] if plain else []
    assert len(own) > 60
    for path in own:
        with pytest.raises(CannotStart, match=r"INFERQ_ROUTER_EXTRA_PATHS: the Router answers \S+ itself.*remove it"):
            check_extra_paths(web_app, ["/v1/fine", path], RouterSettings.variable("extra_paths"))


def test_a_router_with_shadowed_routes_does_not_start() -> None:
    """[B10] The setting is looked at before anything is served; what only an engine answers may be passed on."""
    with pytest.raises(CannotStart, match="/v1/webhook_endpoints itself"):
        build_router(RouterSettings(extra_paths=["/v1/webhook_endpoints"]), open_queue=no_queue)
    other = ["/v1/classify", "/v1/messages", "/v1/other", "/invocations", "/v2/models", "/v1/modelsx"]
    app = build_router(RouterSettings(extra_paths=other), open_queue=no_queue)
    assert app.services.settings.paths.issuperset(other)
