"""No client of ours takes a credential to where an answer redirects it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from broker import BrokerSettings
from broker.connector import BrokerConnector
from inferq.autoscale.drivers.kubernetes import KubernetesDriver
from inferq.autoscale.drivers.port import DriverFailed
from inferq.autoscale.fabric import Fabric
from inferq.autoscale.settings import AutoscaleSettings
from inferq.chat.client import Answer
from inferq.client import RequestFailed
from manager.probe import HttpWorkerProbe
from queue_schemas import (
    JOIN_TOKEN_HEADER,
    BrokerUnavailable,
    Heartbeat,
    InferqError,
    Registration,
    SessionId,
    WorkerId,
)
from router.composition import open_manager
from telemetry.http.fabric_calls import FabricCall
from tests.support.clients import RouterUser
from worker.engines import EngineCall
from worker.engines.http import HttpEngine
from worker.over_http.calls import RouterCalls
from worker.registration.addresses import Addresses
from worker.registration.manager_client import ManagerClient

RUN = SessionId("w.0000000000000001")
HELLO = [{"role": "user", "content": "hello"}]


async def command(url: str) -> None:
    async with RouterUser(url, api_key="s3cret", join_token="s3cret") as client:
        for ask in (client.workers, lambda: client.chat("m", HELLO), lambda: client.purge_dead(["0:1-1"])):
            with pytest.raises(RequestFailed, match="redirected"):
                await ask()
        with pytest.raises(RequestFailed, match="redirected"):
            _ = [piece async for piece in client.stream_chat(Answer(), "m", HELLO)]


async def worker(url: str) -> None:
    client = ManagerClient(Addresses([url], {JOIN_TOKEN_HEADER: "s3cret"}))
    calls: list[Awaitable[object]] = [
        client.register(Registration(worker_id="w", session_id=RUN, slots=1)),
        client.heartbeat("w", Heartbeat(session_id=RUN, slots=1)),
        client.hold_session_connection("w", RUN),
        client.deregister("w", RUN),
    ]
    for call in calls:
        with pytest.raises(InferqError, match="redirects"):
            await call
    await client.close()


async def worker_over_http(url: str) -> None:
    calls = RouterCalls(Addresses([url], {"authorization": "Bearer s3cret"}))
    with pytest.raises(BrokerUnavailable, match="307"):
        await calls.send("POST", f"/sessions/{RUN}/renew")
    await calls.close()


async def router(url: str) -> None:
    manager = open_manager(url, "s3cret", 5_000)
    assert (
        await manager.forward(FabricCall("POST", "/fabric/v1/workers", join_token="s3cret", body=b"{}"))
    ).status == 307
    with pytest.raises(InferqError):
        await manager.broker_address()
    await manager.close()


async def batcher(url: str) -> None:
    stop, faults = asyncio.Event(), list[str]()
    connector = BrokerConnector(
        [url], "s3cret", variable="X", on_fault=lambda fault: (faults.append(fault), stop.set())[0]
    )
    assert await connector.find(BrokerSettings(redis_url=""), stop) is None
    assert faults


async def probe(url: str) -> None:
    async with HttpWorkerProbe(5.0) as asked:
        await asked.ask(url, WorkerId("w"), RUN)


async def engine(url: str) -> None:
    attached = HttpEngine(url, api_key="s3cret")
    async with attached.call(EngineCall("/v1/chat/completions", b"{}", "application/json", "req_1")) as answer:
        assert answer.status == 307
    await attached.stop(0)


async def autoscaler(url: str) -> None:
    async with Fabric([url], "s3cret") as fabric:
        claim = functools.partial(fabric.claim, "m", RUN, 1)
        for ask in (fabric.workers, lambda: fabric.pool("m"), lambda: fabric.drain("w"), claim):
            with pytest.raises(RequestFailed, match="redirected"):
                await ask()


async def kubernetes(url: str) -> None:
    with service_account() as account:
        target = {"kubernetes_target": "deployment/w", "kubernetes_api_url": url, "kubernetes_account_dir": account}
        driver = KubernetesDriver(AutoscaleSettings.load(pool="m", driver="kubernetes", **target))
        with pytest.raises(DriverFailed, match="307"):
            await driver.workers()
        await driver.close()


@contextlib.contextmanager
def service_account() -> Iterator[str]:
    """The folder of one."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("token", "namespace"):
            Path(folder, name).write_text("s3cret")
        yield folder


@contextlib.asynccontextmanager
async def redirecting() -> AsyncIterator[tuple[str, list[str], list[str]]]:
    """A server that sends everybody to another one: its URL, what was asked here, what was asked there."""
    here, there = list[str](), list[str]()

    async def elsewhere(request: web.Request) -> web.Response:
        there.append(f"{request.method} {request.path} {dict(request.headers)}")
        return web.json_response({})

    other = TestServer(web.Application(), host="127.0.0.1")
    other.app.router.add_route("*", "/{path:.*}", elsewhere)
    await other.start_server()

    async def redirect(request: web.Request) -> web.Response:
        here.append(str(request.path))
        return web.Response(status=307, headers={"location": str(other.make_url(request.path))})

    server = TestServer(web.Application(), host="127.0.0.1")
    server.app.router.add_route("*", "/{path:.*}", redirect)
    await server.start_server()
    try:
        yield str(server.make_url("/")).rstrip("/"), here, there
    finally:
        await server.close()
        await other.close()


@pytest.mark.parametrize(
    "client", [command, worker, worker_over_http, router, batcher, probe, engine, autoscaler, kubernetes]
)
async def test_no_credential_follows_a_redirect(client: Callable[[str], Awaitable[None]]) -> None:
    """[A6] Whoever answers 307 is left with an error; nobody else is asked."""
    async with redirecting() as (url, here, there):
        await client(url)
    assert here
    assert there == []
