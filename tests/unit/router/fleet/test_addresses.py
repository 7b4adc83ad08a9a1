"""Errors about unreachable parts of the fabric show clients no address."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from typing import Any

import pytest

from broker import BrokerSettings
from manager import ManagerService, create_app
from manager.service import open_broker
from queue_schemas import BadRequest, InferqError
from queue_schemas.errors import BrokerUnavailable, EngineFailed, ManagerUnavailable, NoWorker
from router import RouterSettings, build_router
from storage import StorageSettings
from telemetry.environment import free_port
from tests.support.waiting import eventually
from tests.unit.manager.fakes import FakeProbe, fast_settings
from tests.unit.router.fakes import Client

WHERE = "redis.internal:6379"
CHAT = b'{"model": "m", "messages": []}'


def subclasses(kind: type[InferqError]) -> list[type[InferqError]]:
    """The whole tree below ``kind``."""
    return [kind, *(deeper for one in kind.__subclasses__() for deeper in subclasses(one))]


@pytest.mark.parametrize("kind", [one for one in subclasses(InferqError) if one.inner], ids=lambda kind: kind.__name__)
def test_errors_about_the_fabrics_parts_name_no_address(kind: type[InferqError]) -> None:
    """[A4] The body that goes out has no address, whoever wrote the message; the message, for the log, has it."""
    error = kind(f"Error 111 connecting to {WHERE} ('10.0.0.7', 6379); try http://10.0.0.7:9000/x")
    body = json.loads(error.body())["error"]
    assert not any(part in body["message"] for part in ("redis.internal", "10.0.0.7", "6379", "9000"))
    assert WHERE in error.message


def test_other_errors_are_shown_unchanged() -> None:
    """What is about the request names what the request named; a text for clients replaces any other."""
    assert b"llama3:70" in NoWorker("no worker serves llama3:70 now").body()
    assert b"http://a:80" in BadRequest("http://a:80 is no model").body()
    assert EngineFailed("at 10.0.0.7:1", public="the engine is away").public == "the engine is away"
    assert {kind.__name__ for kind in (BrokerUnavailable, ManagerUnavailable) if not kind.inner} == set()


async def test_a_router_without_redis_and_manager_says_so_without_addresses(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """[A4] Neither /readyz, nor an answer to a client, nor one to a member of the fleet has host or port of Redis or of
    the Manager; the log has both."""
    caplog.set_level(logging.INFO)
    redis, manager = free_port(), free_port()
    digest = hashlib.sha256(b"k").hexdigest()
    app = build_router(
        RouterSettings.load(
            api_keys=f"{digest}:t", join_token="jt", manager_urls=[f"http://127.0.0.1:{manager}"], shutdown_timeout_ms=0
        ),
        BrokerSettings.load(redis_url=f"redis://127.0.0.1:{redis}/0", retry_limit_ms=100),
        StorageSettings.load(url="memory://addresses"),
    )
    key, token = {"authorization": "Bearer k"}, {"x-inferq-join-token": "jt"}
    json_key = key | {"content-type": "application/json"}
    answers = []
    async with app.running():
        await eventually(lambda: "reached" in str(app.services.not_ready_reasons()), "it has tried")
        for method, path, body, headers in (
            ("GET", "/readyz", b"", {}),
            ("GET", "/healthz", b"", {}),
            ("GET", "/metrics", b"", {}),
            ("POST", "/v1/chat/completions", CHAT, json_key),
            ("POST", "/v1/chat/completions", CHAT, json_key | {"idempotency-key": "a"}),
            ("POST", "/v1/responses", b'{"model": "m", "input": "x", "background": true}', json_key),
            ("GET", "/v1/jobs", b"", key),
            ("GET", "/fabric/v1/pools", b"", key),
            ("GET", "/fabric/v1/dead", b"", token),
            ("GET", "/fabric/v1/workers", b"", token),
            ("GET", "/fabric/v1/broker", b"", token),
        ):
            answer = await Client(app).request(method, path, body, headers)
            answers.append((path, answer.status, answer.body.decode()))
    assert [status for path, status, _ in answers if path not in ("/healthz", "/metrics")] == [503] * 9, answers
    assert not [each for each in answers if "127.0.0.1" in each[2] or str(redis) in each[2] or str(manager) in each[2]]
    log = caplog.text + capsys.readouterr().out + capsys.readouterr().err
    assert f"127.0.0.1:{redis}" in log
    assert f"127.0.0.1:{manager}" in log


async def test_a_manager_without_redis_says_so_without_its_address() -> None:
    """[A4] Its /readyz and its answers, forwarded to workers by Routers, do not name Redis."""
    port = free_port()
    settings = BrokerSettings.load(redis_url=f"redis://:pw@127.0.0.1:{port}/0", retry_limit_ms=100)
    service = ManagerService(fast_settings(), open_broker(settings), FakeProbe(), broker_url=settings.redis_url)
    app: Any = create_app(service)
    stop = asyncio.Event()
    running = asyncio.create_task(service.run(stop))
    try:
        await eventually(lambda: "has not been" not in service.not_ready()[0], "it has tried")
        for path in ("/readyz", "/fabric/v1/workers", "/fabric/v1/broker", "/fabric/v1/pools"):
            answer = await Client(app).request("GET", path)
            assert answer.status == 503, path
            assert "reached" in answer.body.decode()
            assert not any(part in answer.body.decode() for part in ("127.0.0.1", str(port), "pw"))
    finally:
        stop.set()
        await running
