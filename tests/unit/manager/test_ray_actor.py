"""The Manager's actor, without Ray around it: Ray calls the same methods of the same class."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from broker import BrokerSettings
from manager import ray_actor
from manager.ray_actor import ManagerActor, ensure_manager
from manager.settings import ManagerSettings
from queue_schemas import BrokerUnsuitable, CannotStart
from telemetry import TelemetrySettings, configure_logging
from telemetry.backoff import Backoff
from telemetry.environment import free_port
from tests.support.fault_proxy import ScriptedRedis
from tests.support.servers import Server
from tests.support.waiting import eventually
from tests.unit.manager.fakes import fast_settings

REGISTRATION = {"worker_id": "w", "session_id": "w.0000000000000001", "models": ["m"], "slots": 2, "engine": "ready"}
JSON = [("content-type", "application/json")]
OLD = "redis_version:5.0.0\r\n"


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's metrics need Ray."""

    async def none(*_args: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(ray_actor, "mirror_metrics", none)
    monkeypatch.setattr(ray_actor, "configure_logging", lambda *_args: None)


@pytest.fixture
def log_lines() -> io.StringIO:
    """What is logged from now on, as JSON lines."""
    stream = io.StringIO()
    configure_logging("manager", "info", "json", stream=stream)
    return stream


@asynccontextmanager
async def actor(redis_url: str, settings: ManagerSettings | None = None) -> AsyncIterator[ManagerActor]:
    """One, stopped at the end within its limit."""
    one = ManagerActor.__new__(ManagerActor)
    broker = BrokerSettings(redis_url=redis_url, retry_limit_ms=200)
    await one.__init__(settings or fast_settings(), broker, TelemetrySettings(), "digest")  # type: ignore[misc]
    try:
        yield one
    finally:
        async with asyncio.timeout(5):
            await one.stop()


async def acting(one: ManagerActor) -> None:
    async def acts() -> bool:
        return (await one.facts()).acting

    await eventually(acts, "the actor acts")


async def test_it_answers_what_the_http_api_answers(valkey: Server) -> None:
    """A registration, a heartbeat of somebody unknown, a path that is none, each as over HTTP."""
    async with actor(valkey.url) as one:
        await acting(one)
        status, headers, body = await one.answer(
            "POST", "/fabric/v1/workers", "", JSON, json.dumps(REGISTRATION).encode()
        )
        assert status == 200, body
        assert dict(headers)["content-type"] == "application/json"
        assert json.loads(body)["assignment"]["pools"][0]["pool"] == "m"
        beat = {key: value for key, value in REGISTRATION.items() if key != "worker_id"}
        status, _, body = await one.answer(
            "POST", "/fabric/v1/workers/x/heartbeat", "", JSON, json.dumps(beat).encode()
        )
        assert (status, json.loads(body)["error"]["code"]) == (410, "unknown_worker")
        assert (await one.answer("GET", "/nowhere", "", [], b""))[0] == 404
        query = f"session_id={REGISTRATION['session_id']}"
        assert (await one.answer("DELETE", "/fabric/v1/workers/w", query, [], b""))[0] == 204


async def test_the_join_token_is_asked_for(valkey: Server) -> None:
    """The actor guards its API itself, and does not rely on the Router having done so."""
    async with actor(valkey.url, fast_settings(join_token="t0ken")) as one:
        await acting(one)
        assert (await one.answer("GET", "/fabric/v1/broker", "", [], b""))[0] == 401
        status, _, body = await one.answer("GET", "/fabric/v1/broker", "", [("x-inferq-join-token", "t0ken")], b"")
        assert (status, json.loads(body)["broker_url"]) == (200, valkey.url)


async def test_facts_say_how_it_is(valkey: Server) -> None:
    """Whose settings, which process, and that it acts."""
    async with actor(valkey.url) as one:
        await acting(one)
        facts = await one.facts()
        assert (facts.digest, facts.pid, facts.acting, facts.not_ready) == ("digest", os.getpid(), True, [])


async def test_without_redis_it_waits_and_says_so() -> None:
    """Nobody listens: the actor is there, answers 503 and is not ready, with the reason."""
    async with actor(f"redis://127.0.0.1:{free_port()}/0") as one:

        async def told() -> bool:
            return "Redis" in " ".join((await one.facts()).not_ready)

        await eventually(told, "the reason is told")
        assert not (await one.facts()).acting
        status, _, body = await one.answer("POST", "/fabric/v1/workers", "", JSON, json.dumps(REGISTRATION).encode())
        assert (status, json.loads(body)["error"]["code"]) == (503, "manager_unavailable")


async def test_a_redis_that_cannot_carry_the_queue_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not end, since Ray would only start it again: it says why, looks again with growing pauses, and works
    once the server has been replaced."""
    monkeypatch.setattr(ray_actor, "_BACKOFF", Backoff(0.05, 30.0))
    async with ScriptedRedis(OLD) as old, actor(old.url) as one:

        async def told() -> list[str]:
            return [reason for reason in (await one.facts()).not_ready if "5.0.0" in reason]

        reason = await eventually(told, "the reason names the version")
        assert "7.0" in reason[0]
        tries = 0
        connect = one._service.run

        async def counted(stop: asyncio.Event) -> None:
            nonlocal tries
            tries += 1
            await connect(stop)

        monkeypatch.setattr(one._service, "run", counted)
        await eventually(lambda: tries >= 2, "it is tried again")
        monkeypatch.setattr(one._service, "run", asyncio.Event.wait)  # a server that will do
        await eventually(lambda: one._unfit == "", "it has stopped complaining")


async def test_it_stops_at_once_in_the_longest_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause before the next try does not hold up its end."""
    monkeypatch.setattr(ray_actor, "_BACKOFF", Backoff(60.0, 60.0))
    async with ScriptedRedis(OLD) as old, actor(old.url) as one:
        await eventually(lambda: one._unfit != "", "it waits for the next try")
        async with asyncio.timeout(2):
            await one.stop()
        assert one._task.done()


async def test_the_lease_is_handed_back(valkey: Server) -> None:
    """The next Manager acts at once, not when the lease has run out."""
    slow = fast_settings(leader_lease_ms=30_000)
    async with actor(valkey.url, slow) as one:
        await acting(one)
    async with actor(valkey.url, slow) as two:
        await acting(two)


_BROKEN = """
import asyncio, sys
from manager import ray_actor
from manager.control_plane import ManagerService
from manager.settings import ManagerSettings
from broker import BrokerSettings
from telemetry import TelemetrySettings

async def broken(self, stop):
    raise RuntimeError("nobody foresaw this")

async def main():
    ManagerService.run = broken
    one = ray_actor.ManagerActor.__new__(ray_actor.ManagerActor)
    await one.__init__(ManagerSettings(), BrokerSettings(redis_url="redis://127.0.0.1:1/0"), TelemetrySettings(), "")
    await asyncio.sleep(30)

asyncio.run(main())
"""


def test_what_nobody_foresaw_ends_the_process(tmp_path: Path) -> None:
    """A half-dead actor would serve nobody for ever; Ray replaces a dead one. Its log has the traceback."""
    ended = subprocess.run(
        [sys.executable, "-c", _BROKEN],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
        cwd=Path(__file__).parents[3],
    )
    assert ended.returncode == 1
    assert '"event":"actor_broken"' in ended.stderr
    assert "nobody foresaw this" in ended.stderr


@pytest.mark.parametrize("url", ["", "http://not-redis"])
def test_settings_that_cannot_work_make_no_actor(url: str) -> None:
    """Refused before Ray is asked for anything."""
    with pytest.raises((CannotStart, BrokerUnsuitable)):
        ensure_manager(ManagerSettings(), BrokerSettings(redis_url=url), TelemetrySettings())


async def test_the_log_names_the_request(valkey: Server, log_lines: io.StringIO) -> None:
    """What the Manager logs of a worker's call carries the request id that its Router gave the call."""
    async with actor(valkey.url) as one:
        await acting(one)
        body = json.dumps(REGISTRATION).encode()
        call = one.answer("POST", "/fabric/v1/workers", "", [*JSON, ("x-request-id", "req_of_worker")], body)
        assert (await asyncio.create_task(call))[0] == 200  # in a task of its own, as Ray runs it
    lines = [json.loads(line) for line in log_lines.getvalue().splitlines()]
    assert [line["event"] for line in lines if line.get("request_id") == "req_of_worker"] == ["worker_joined"]
