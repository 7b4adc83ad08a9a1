"""Who may call which path: every route of every service, called as every principal."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI

from inferq.access_table import DOCUMENT, declared_routes, render, with_table
from manager import ManagerService, create_app
from queue_schemas import DeadLetterList, Registration
from router.ports import FabricCall, Forwarded
from telemetry import MetricsRegistry
from telemetry.http.access import Access, DeclaredRoute, allow, declared
from telemetry.http.app import health_app, prepare_app
from tests.support.waiting import eventually
from tests.unit.manager.fakes import FakeProbe, fast_settings
from tests.unit.manager.fakes import FakeQueue as ManagersQueue
from tests.unit.router.fakes import Client, FakeQueue, router
from worker.routes import Status, make_app

KEY, TOKEN = "a-key", "the-token"
LOCAL = {"host": "127.0.0.1:18000", "content-type": "application/json"}
PRINCIPALS: Mapping[str, Mapping[str, str]] = {
    "program of this machine": LOCAL,
    "client": LOCAL | {"authorization": f"Bearer {KEY}"},
    "member": LOCAL | {"x-inferq-join-token": TOKEN},
    "wrong credentials": LOCAL | {"authorization": "Bearer x", "x-inferq-join-token": "x"},
    "web page": LOCAL | {"origin": "http://evil.example"},
    "sandboxed web page": LOCAL | {"origin": "null"},
    "rebound web page": LOCAL | {"host": "evil.example:18000", "origin": "http://evil.example:18000"},
}
WEB = {"web page", "sandboxed web page", "rebound web page"}
LIMIT_S = 10.0


@dataclass(frozen=True)
class Setting:
    """Which credentials a service is configured with."""

    keys: bool
    token: bool


SETTINGS = [Setting(keys, token) for keys in (False, True) for token in (False, True)]


class AnsweringManager:
    """A Manager behind the Router that takes whatever reaches it."""

    async def forward(self, call: FabricCall) -> Forwarded:
        return Forwarded(200, (), b"{}")

    async def broker_address(self) -> Any:
        raise AssertionError("nobody asks")

    async def close(self) -> None:
        return None


class NoDeadLetters:
    """The dead letters of a queue that has none."""

    async def page(self, after: str, limit: int) -> DeadLetterList:
        return DeadLetterList(letters=[])

    async def request(self, letter_id: str) -> None:
        return None

    async def forget(self, ids: list[str]) -> int:
        return 0


def may(access: Access | None, principal: str, given: Setting) -> bool:
    """The rule, as docs/security.md says it."""
    local = principal not in WEB
    client = principal == "client" if given.keys else local
    match access:
        case Access.PUBLIC:
            return True
        case Access.CLIENT:
            return client
        case Access.CLIENT_OR_MEMBER:
            return client or (given.token and principal == "member")
        case Access.MEMBER | Access.WORKER:
            return principal == "member" if given.token else local and not given.keys
    raise AssertionError(f"no access is declared: {access}")


@asynccontextmanager
async def service(name: str, given: Setting) -> AsyncIterator[tuple[Any, list[DeclaredRoute]]]:
    """A service of that name, with its routes."""
    token = TOKEN if given.token else ""
    if name == "Router":
        keys = f"{hashlib.sha256(KEY.encode()).hexdigest()}:t" if given.keys else ""
        queue = FakeQueue("m")
        queue.dead_letters = NoDeadLetters()  # type: ignore[attr-defined]
        async with router(queue, AnsweringManager(), api_keys=keys, join_token=token) as app:
            yield app, app.declared_routes()
    elif name == "Manager":
        managers = ManagersQueue()
        manager = ManagerService(fast_settings(join_token=token), managers.open, FakeProbe(), broker_url="redis://x:1")
        made = create_app(manager)
        yield made, declared(made)
    else:
        status = Status(
            worker_id="w", session_id="w.0000000000000001", ready=True, reasons=[], draining=False, engine="ready",
            engine_detail="", models=[], slots=1, running=0, broker_ok=True, manager_url="http://m", assignment=(0, 0),
        )  # fmt: skip
        made = make_app(lambda: status, lambda: None, MetricsRegistry("worker"), token)
        yield made, declared(made)


async def status_of(app: Any, route: DeclaredRoute, headers: Mapping[str, str]) -> int:
    """What the call is answered; one that is let in may then be refused for what it asks."""
    path = re.sub(r"\{(\w+)[^}]*\}", lambda found: "w" if found[1] == "worker_id" else "m", route.path)
    query = "?session_id=w.0000000000000001" if "workers/" in path else ""
    client = Client(app)
    answer = client.begin(route.method, path + query, [b"{}" if route.method == "POST" else b""], headers)
    try:
        async with asyncio.timeout(LIMIT_S):
            while not answer.status:
                await answer.changed.wait()
                answer.changed.clear()
    finally:
        client.gone.set()
        answer.task.cancel()
        await asyncio.gather(answer.task, return_exceptions=True)
    return answer.status


CASES = [("Router", given) for given in SETTINGS]
CASES += [(name, Setting(keys=False, token=token)) for name in ("Manager", "Worker") for token in (False, True)]


@pytest.mark.parametrize(("name", "given"), CASES, ids=[f"{n}-keys={g.keys}-token={g.token}" for n, g in CASES])
async def test_each_path_is_open_to_exactly_whom_it_declares(name: str, given: Setting) -> None:
    """[A1] [A3] [A5] Every path of the apps, called as every principal, under every configuration of credentials."""
    wrong = []
    async with service(name, given) as (app, routes):
        assert len(routes) > 8
        for route in routes:
            for principal, headers in PRINCIPALS.items():
                status = await status_of(app, route, headers)
                if status == 500 or (status not in (401, 403)) != may(route.access, principal, given):
                    wrong.append(f"{route.method} {route.path} ({route.access}) as {principal}: {status}")
    assert wrong == []


def test_every_route_declares_who_may_call_it() -> None:
    """A route without a declaration, or with two, is refused: nothing is open because somebody forgot."""
    assert all(route.access for routes in declared_routes().values() for route in routes)
    app = health_app("x", MetricsRegistry("x"), list)
    app.add_api_route("/forgotten", lambda: None)
    assert DeclaredRoute("GET", "/forgotten", None) in declared(app)
    with pytest.raises(ValueError, match="GET /forgotten declares no access"):
        render({"X": declared(app)})
    twice = prepare_app(FastAPI(), MetricsRegistry("x"))
    routes = APIRouter(dependencies=[allow(Access.MEMBER)])
    routes.add_api_route("/twice", lambda: None, dependencies=[allow(Access.PUBLIC)])
    twice.include_router(routes)
    with pytest.raises(ValueError, match="more than one access"):
        declared(twice)


def test_the_table_in_the_documents_is_the_code() -> None:
    """docs/security.md lists what the apps declare; `python -m inferq.access_table --write` brings it up to date."""
    text = DOCUMENT.read_text()
    assert with_table(text, render(declared_routes())) == text


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
@pytest.mark.parametrize("name", ["Router", "Manager", "Worker"])
async def test_what_browsers_send_across_sites_changes_nothing(name: str, kind: str | None) -> None:
    """[A3] A call of the control plane with a body that is not said to be JSON is 415, with and without a token."""
    for token in (False, True):
        async with service(name, Setting(keys=False, token=token)) as (app, routes):
            changing = [route for route in routes if route.access is Access.MEMBER and route.method == "POST"]
            assert changing
            for route in changing:
                headers = PRINCIPALS["member"] | {"content-length": "2", "content-type": kind or ""}
                if kind is None:
                    headers.pop("content-type")
                assert await status_of(app, route, headers) == 415, route.path


async def test_a_call_without_a_body_needs_no_media_type() -> None:
    """`curl -X POST .../drain` goes on working."""
    octets = {"content-length": "0", "content-type": "application/octet-stream"}  # as aiohttp sends it
    for more in ({}, {"content-length": "0"}, octets):
        async with service("Worker", Setting(keys=False, token=False)) as (app, _):
            answer = await Client(app).request("POST", "/drain", b"", {"host": "localhost:1", **more})
        assert answer.status == 202


@pytest.mark.parametrize("token", ["", TOKEN])
@pytest.mark.parametrize("advertised", ["", "rediss://u:s3cret@redis.example:6380/0"])
async def test_no_password_leaves_to_who_shows_no_token(token: str, advertised: str) -> None:
    """[A3] Without a join token, a registration and the queue's address are answered without user and password."""
    queue, url = ManagersQueue(), "redis://:s3cret@127.0.0.1:1/0?password=s3cret"
    settings = fast_settings(join_token=token, advertised_redis_url=advertised)
    manager = ManagerService(settings, queue.open, FakeProbe(), broker_url=url)
    stop = asyncio.Event()
    running = asyncio.create_task(manager.run(stop))
    try:
        await eventually(lambda: manager.acting, "the Manager acts")
        joined = await manager.register(Registration(worker_id="w", session_id="w.0000000000000001", slots=1))
        told = {joined.broker_url, (await manager.broker_address()).broker_url}
    finally:
        stop.set()
        await running
    stripped = "rediss://redis.example:6380/0" if advertised else "redis://127.0.0.1:1/0"
    assert told == ({advertised or url} if token else {stripped})


@pytest.mark.parametrize("origin", ["https://app.example", "*"])
async def test_pages_of_allowed_origins_are_clients_and_no_members(origin: str) -> None:
    """[A3] The CORS setting of a Router without credentials opens models to a page, and the control plane never."""
    page = LOCAL | {"origin": "https://app.example"}
    async with router(FakeQueue("m"), AnsweringManager(), cors_allow_origins=[origin]) as app:
        client = Client(app)
        assert (await client.request("GET", "/v1/models", b"", page)).status == 200
        assert (await client.request("GET", "/fabric/v1/workers", b"", page)).status == 403
        assert (await client.request("POST", "/fabric/v1/workers", b"{}", page)).status == 403
