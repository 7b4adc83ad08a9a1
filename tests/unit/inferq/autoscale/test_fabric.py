"""What the autoscaler asks of Routers and Managers, of whichever answers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from inferq.autoscale.fabric import Fabric
from inferq.client import RequestFailed
from queue_schemas import JOIN_TOKEN_HEADER, SessionId
from telemetry.environment import free_port

ME = SessionId("auto.0000000000000001")


class Router:
    """Answers every call with ``status``; ``calls`` has what came."""

    def __init__(self) -> None:
        self.status = 200
        self.calls: list[tuple[str, str, str, object]] = []
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self.server = TestServer(app, host="127.0.0.1")

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        token = request.headers.get(JOIN_TOKEN_HEADER, "")
        self.calls.append((request.method, request.path, token, json.loads(body) if body else None))
        if self.status != 200:
            error = {"error": {"message": "not now", "code": "x"}}
            return web.json_response(error, status=self.status)
        answers = {"/autoscalers": {"acting": True}, "/workers": {"workers": []}}
        known = {path: answer for path, answer in answers.items() if request.path.endswith(path)}
        return web.json_response(next(iter(known.values()), {"model": "org/m", "waiting": 3}))


@pytest.fixture
async def router() -> AsyncIterator[Router]:
    router = Router()
    await router.server.start_server()
    yield router
    await router.server.close()


@pytest.fixture
async def other() -> AsyncIterator[Router]:
    router = Router()
    await router.server.start_server()
    yield router
    await router.server.close()


def url(router: Router) -> str:
    return str(router.server.make_url("/")).rstrip("/")


async def test_it_asks_with_the_join_token(router: Router) -> None:
    """For the pool, whose name may have a slash, the workers, a drain and the claim."""
    async with Fabric([url(router)], "t0ken") as fabric:
        assert (await fabric.pool("org/m")).waiting == 3
        assert await fabric.workers() == []
        await fabric.drain("w-1")
        assert await fabric.claim("org/m", ME, 5_000)
    assert router.calls == [
        ("GET", "/fabric/v1/pools/org/m", "t0ken", None),
        ("GET", "/fabric/v1/workers", "t0ken", None),
        ("POST", "/fabric/v1/workers/w-1/drain", "t0ken", None),
        ("POST", "/fabric/v1/autoscalers", "t0ken", {"pool": "org/m", "autoscaler_id": ME, "ttl_ms": 5_000}),
    ]


async def test_whoever_answers_is_asked_first_from_then_on(router: Router, other: Router) -> None:
    """One that is gone, and one that is not ready, are passed over."""
    gone = f"http://127.0.0.1:{free_port()}"
    router.status = 503
    async with Fabric([gone, url(router), url(other)], "") as fabric:
        for _ in range(3):
            assert await fabric.workers() == []
        assert (len(router.calls), len(other.calls)) == (1, 3)
        other.status = 503
        with pytest.raises(RequestFailed, match="not now"):
            await fabric.workers()


async def test_a_refusal_is_the_answer(router: Router, other: Router) -> None:
    """A wrong token is no reason to ask the next; that a worker is gone already is what a drain wanted."""
    async with Fabric([url(router), url(other)], "wrong") as fabric:
        router.status = 401
        with pytest.raises(RequestFailed, match="join-token"):
            await fabric.workers()
        router.status = 410
        await fabric.drain("w-1")
        router.status = 400
        with pytest.raises(RequestFailed, match="not now"):
            await fabric.drain("w-1")
    assert other.calls == []
