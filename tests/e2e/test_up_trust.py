"""Who may speak to what `inferq up` started."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.e2e.test_up import READY_LIMIT_S, ROOT, StartUp, start_up
from tests.support.clients import RouterUser
from tests.support.processes import Child, environment
from tests.support.waiting import eventually

__all__ = ["start_up"]
BODY = {"worker_id": "outsider", "session_id": "outsider.0000000000000001", "slots": 1}


@asynccontextmanager
async def asking(method: str, url: str, headers: Mapping[str, str], **given: Any) -> AsyncIterator[tuple[int, str]]:
    """The status and text of one answer."""
    async with aiohttp.ClientSession() as session, session.request(method, url, headers=headers, **given) as answer:
        yield answer.status, await answer.text()


def read_private(file: Path) -> str:
    """What is in a file that only its owner may read."""
    assert file.stat().st_mode & 0o777 == 0o600
    return file.read_text().strip()


async def test_without_credentials_a_stack_answers_local_programs_and_no_password(
    start_up: StartUp, tmp_path: Path
) -> None:
    """[A3] What a web page or a rebound name asks is refused, nobody is told the queue's password, and a worker that is
    started by hand beside it joins all the same."""
    stack = await start_up("--workers", "0").ready()
    password = (tmp_path / ".inferq" / "valkey" / "password").read_text().strip()
    for url in (stack["router_url"], stack["manager_url"]):
        for method, path, headers, given, status in (
            ("POST", "/fabric/v1/workers", {"origin": "http://evil.example"}, {"json": BODY}, 403),
            ("POST", "/fabric/v1/workers", {"content-type": "text/plain"}, {"data": b"{}"}, 415),
            ("GET", "/fabric/v1/broker", {"host": "evil.example"}, {}, 403),
            ("GET", "/fabric/v1/broker", {}, {}, 200),
            ("POST", "/fabric/v1/workers", {}, {"json": BODY}, 200),
        ):
            async with asking(method, url + path, headers, **given) as (got, text):
                assert (got, password in text) == (status, False), (url, path, headers, text)
    chat, page = f"{stack['router_url']}/v1/chat/completions", {"origin": "http://evil.example"}
    async with asking("POST", chat, page | {"content-type": "text/plain"}, data=b'{"model": "sim"}') as (got, _):
        assert got == 403
    args = [sys.executable, "-m", "inferq", "worker", "--manager-url", stack["router_url"], "--worker-id", "by-hand"]
    args += ["--engine", "sim", "--model", "sim", "--port", "0"]
    clean = environment()
    child = Child("worker", args, tmp_path / "worker.log", env=clean | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    child.start()
    try:
        async with RouterUser(stack["router_url"]) as client:

            async def serves() -> bool:
                return any(one.worker_id == "by-hand" and one.takes_work for one in (await client.workers()).workers)

            await eventually(serves, "the worker joins", limit_s=READY_LIMIT_S)
            assert (await client.chat("sim", [{"role": "user", "content": "hello"}], max_tokens=4)).text
    finally:
        child.kill_group()


async def test_with_api_keys_a_stack_makes_its_own_join_token(start_up: StartUp) -> None:
    """[A1] Keys and no join token: one is made, kept for its owner, and asked for; workers join with it."""
    digest = hashlib.sha256(b"k").hexdigest()
    stack = await start_up(env={"INFERQ_ROUTER_API_KEYS": f"{digest}:t"}).ready()
    token, key = read_private(Path(stack["join_token_file"])), {"authorization": "Bearer k"}
    for role in ("router_url", "manager_url"):
        for method, path in (
            ("GET", "/fabric/v1/broker"),
            ("GET", "/fabric/v1/workers"),
            ("POST", "/fabric/v1/workers"),
            ("POST", "/fabric/v1/workers/worker-1/drain"),
        ):
            for given in ({}, key):
                async with asking(method, stack[role] + path, given, json=BODY) as (status, _):
                    assert status == 401, (role, path, given)
    async with RouterUser(stack["router_url"], join_token=token) as client:
        assert [worker.worker_id for worker in (await client.workers()).workers] == ["worker-1"]
