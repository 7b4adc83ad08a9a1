"""The Router as a process: how it starts, what it refuses, how it ends, and what becomes of its clients' jobs."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import httpx
import orjson
import pytest

from broker import Broker, Undelivered
from queue_schemas import Lane
from telemetry.environment import free_port
from tests.integration.router.harness import CHAT, PATH, STREAM, Speaker
from tests.support.processes import Child, answers, role_starter
from tests.support.queue import MODEL
from tests.support.servers import Server
from tests.support.waiting import eventually

PUBLIC = "0.0.0.0"  # noqa: S104 - nothing is bound: the test is that it is refused
Start = Callable[..., Child]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start ``python -m router.service`` with these flags, in a folder of its own."""
    with role_starter("router.service", tmp_path) as start:
        yield start


def _serving(start: Start, valkey: Server, *flags: str) -> tuple[Child, int]:
    port = free_port()
    child = start("--port", str(port), "--redis-url", valkey.url, "--pools", MODEL, *flags)
    child.until(lambda: answers(f"http://127.0.0.1:{port}/readyz"), 20)
    return child, port


async def _post(port: int, fields: object) -> tuple[int, bytes]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://127.0.0.1:{port}{PATH}", json=fields) as answer,
    ):
        return answer.status, await answer.read()


async def test_it_serves_and_shuts_down_cleanly_on_sigterm(start: Start, valkey: Server) -> None:
    """SIGTERM lets an open request finish, and the process ends with code 0."""
    child, port = _serving(start, valkey)
    async with Speaker.join(valkey.url) as worker:
        asking = asyncio.ensure_future(_post(port, CHAT))
        lease = await worker.lease()
        child.send(signal.SIGTERM)
        await eventually(lambda: "draining" in child.log_text(), "the router drains")
        assert (await _post(port, CHAT))[0] == 503
        await worker.answer(lease, b"good")
        assert await asking == (200, b"good")
    assert await asyncio.to_thread(child.wait, 15) == 0


async def test_a_second_signal_ends_open_requests_with_an_error(start: Start, valkey: Server, broker: Broker) -> None:
    """[G4] A Router that is told twice waits for no request: each gets an error that says to ask again, not a broken
    connection, its job is cancelled, and the process ends in good order."""
    child, port = _serving(start, valkey)
    async with Speaker.join(valkey.url) as worker:
        asking = asyncio.ensure_future(_post(port, CHAT))
        await worker.lease()
        child.send(signal.SIGTERM)
        await eventually(lambda: "draining" in child.log_text(), "the router drains")
        child.send(signal.SIGTERM)
        status, body = await asking
        assert (status, orjson.loads(body)["error"]["code"]) == (503, "shutting_down")
    assert await asyncio.to_thread(child.wait, 10) == 0


async def test_a_killed_router_leaves_no_work_behind(start: Start, valkey: Server, broker: Broker) -> None:
    """When a Router dies while clients wait, its waiting jobs are cancelled once its reply stream has run out, and an
    answer on its way finds nobody, without an error."""
    child, port = _serving(start, valkey)
    async with Speaker.join(valkey.url) as worker:
        running = asyncio.ensure_future(_post(port, STREAM))
        lease = await worker.lease()
        waiting = asyncio.ensure_future(_post(port, CHAT))

        async def one_waits() -> bool:
            return (await broker.stats.depths())[MODEL][Lane.INTERACTIVE].waiting == 1

        await eventually(one_waits, "a job waits")
        child.kill()
        with pytest.raises(aiohttp.ClientError):
            await running
        with pytest.raises(aiohttp.ClientError):
            await waiting
        stream = f"iq:{{0}}:reply:{lease.job.reply_to}"
        assert 0 < valkey.ask("PTTL", stream) <= 25 * 3_600_000
        valkey.ask("DEL", stream)
        assert await broker.attempts.publish(0, {lease.job.reply_to: worker.frame(lease, b"x")}) == {
            lease.job.reply_to: Undelivered.GONE
        }
        assert await worker.puller.claim(4) == []
        assert (await broker.stats.job_counts()).events[(MODEL, Lane.INTERACTIVE, "cancelled")] == 1


def test_a_taken_port_is_one_sentence(start: Start, valkey: Server) -> None:
    """A port that is taken ends the start with code 2 and what to do."""
    _, port = _serving(start, valkey)
    second = start("--port", str(port), "--redis-url", valkey.url)
    assert second.wait(20) == 2
    assert f"port {port}" in second.log_text()
    assert "Traceback" not in second.log_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "--redis-url"),
        (("--redis-url", "redis://x", "--host", PUBLIC), "API keys"),
        (("--redis-url", "redis://x", "--api-keys", "sk-plain:t"), "sha256sum"),
        (
            ("--redis-url", "redis://x", "--extra-paths", "/fabric/v1/workers"),
            "the Router answers /fabric/v1/workers itself",
        ),
        (("--redis-url", "foo://x"), "Redis URL"),
        (("--manager-url", "localhost:9000"), "must begin with http:// or https://"),
        (("--redis-url", "redis://x", "--max-body-bytes", "many"), "INFERQ_ROUTER_MAX_BODY_BYTES"),
    ],
)
def test_settings_that_cannot_work_are_one_sentence(start: Start, flags: tuple[str, ...], words: str) -> None:
    """A wrong setting ends the start with code 2 and a sentence that names it."""
    child = start("--port", "0", *flags)
    assert child.wait(20) == 2
    assert words in child.log_text()
    assert "Traceback" not in child.log_text()


def test_a_redis_that_refuses_the_password_ends_it(start: Start, own_valkey: Server) -> None:
    """A wrong password is not waited for: exit code 2 and where to look."""
    own_valkey.ask("CONFIG", "SET", "requirepass", "right")
    child = start("--port", "0", "--redis-url", own_valkey.url.replace("redis://", "redis://:wrong@"))
    assert child.wait(30) == 2, child.log_tail()
    assert "check the user and password in INFERQ_REDIS_URL" in child.log_text().splitlines()[-1]
    assert "Traceback" not in child.log_text()


def test_without_its_manager_it_waits_and_reports_it(start: Start) -> None:
    """A Router that is to ask a Manager that is not there answers requests with 503 and the reason."""
    port = free_port()
    child = start("--port", str(port), "--manager-url", f"http://127.0.0.1:{free_port()}")
    child.until(lambda: answers(f"http://127.0.0.1:{port}/healthz"), 20)
    ready = httpx.get(f"http://127.0.0.1:{port}/readyz")
    assert ready.status_code == 503
    child.until(lambda: "the Manager" in httpx.get(f"http://127.0.0.1:{port}/readyz").text, 10)
    answer = httpx.post(f"http://127.0.0.1:{port}{PATH}", content=orjson.dumps(CHAT))
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "broker_unavailable"
    workers = httpx.get(f"http://127.0.0.1:{port}/fabric/v1/workers")
    assert (workers.status_code, workers.json()["error"]["code"]) == (503, "manager_unavailable")
    assert child.terminate() == 0


def test_it_asks_its_manager_where_redis_is(start: Start, valkey: Server, tmp_path: Path) -> None:
    """With only --manager-url a Router becomes ready, whichever of the two was started first; and workers register
    through it."""
    ports = free_port(), free_port()
    router = start("--port", str(ports[0]), "--manager-url", f"http://127.0.0.1:{ports[1]}", INFERQ_JOIN_TOKEN="jt")
    router.until(lambda: answers(f"http://127.0.0.1:{ports[0]}/healthz"), 20)
    args = [sys.executable, "-m", "manager.service", "--port", str(ports[1]), "--redis-url", valkey.url]
    env = dict(os.environ) | {"INFERQ_JOIN_TOKEN": "jt"}
    manager = Child("manager", args, tmp_path / "manager.log", env=env, cwd=tmp_path)
    manager.start()
    try:
        router.until(lambda: answers(f"http://127.0.0.1:{ports[0]}/readyz"), 30)
        url = f"http://127.0.0.1:{ports[0]}/fabric/v1/workers"
        body = {"worker_id": "w", "session_id": "w.0000000000000001", "models": ["m"], "slots": 1, "engine": "ready"}
        assert httpx.post(url, json=body).status_code == 401
        registered = httpx.post(url, json=body, headers={"x-inferq-join-token": "jt"})
        assert registered.status_code == 200
        assert registered.json()["broker_url"] == valkey.url
        router.until(lambda: '"m"' in httpx.get(f"http://127.0.0.1:{ports[0]}/v1/models").text, 10)
    finally:
        manager.kill_group()
