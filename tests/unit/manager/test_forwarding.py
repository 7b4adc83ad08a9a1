"""A Manager that stands by passes on what only the acting one may decide."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest

from manager import ManagerService, create_app
from telemetry.http.server import bind_socket, run_server
from tests.support.waiting import eventually
from tests.unit.manager.fakes import FakeProbe, FakeQueue, fast_settings

TOKEN = "the fleet's secret"
WORKER = {"worker_id": "w", "session_id": "w.0000000000000001", "models": ["m"], "slots": 1, "engine": "ready"}
MEMBER = {"x-inferq-join-token": TOKEN}


@asynccontextmanager
async def serving(queue: FakeQueue, token: str = TOKEN) -> AsyncIterator[tuple[ManagerService, str]]:
    """A Manager on a port of its own, as its process would serve it."""
    stop = asyncio.Event()
    with bind_socket("127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        service = ManagerService(
            fast_settings(join_token=token), queue.open, FakeProbe(), broker_url="redis://here", url=url
        )
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            tasks.create_task(service.run(stop))
            tasks.create_task(run_server(create_app(service), sock=listener, stop=stop, shutdown_timeout_s=1))
            try:
                yield service, url
            finally:
                stop.set()


@pytest.fixture
async def two() -> AsyncIterator[tuple[ManagerService, ManagerService, str]]:
    """One that acts, one that stands by and knows where the other is, and the URL of the latter."""
    queue = FakeQueue()
    async with AsyncExitStack() as exits:
        acting, _ = await exits.enter_async_context(serving(queue))
        await eventually(lambda: acting.acting, "the first acts")
        standby, url = await exits.enter_async_context(serving(queue))
        await eventually(lambda: standby.acting_manager.url, "the second knows where the first is")
        yield acting, standby, url


async def test_a_standby_leads_a_worker_to_the_acting_manager(
    two: tuple[ManagerService, ManagerService, str],
) -> None:
    """[A7] Registration, heartbeat and goodbye through the standby are the acting Manager's."""
    acting, standby, url = two
    async with httpx.AsyncClient(base_url=f"{url}/fabric/v1", headers=MEMBER, trust_env=False) as client:
        assert (await client.post("/workers", json=WORKER)).status_code == 200
        assert [one.worker_id for one in (await acting.list_workers()).workers] == ["w"]
        assert (await client.post("/workers/w/heartbeat", json=WORKER)).status_code == 200
        assert (await client.delete(f"/workers/w?session_id={WORKER['session_id']}")).status_code == 204
        assert (await acting.list_workers()).workers == []
        assert (await client.post("/workers/w/heartbeat", json=WORKER)).status_code == 410
        assert not standby.acting


async def test_a_call_is_passed_on_once_and_only_for_members(two: tuple[ManagerService, ManagerService, str]) -> None:
    """[A7] Two Managers that each take the other for the acting one do not play ball with a call; outsiders get none
    passed on."""
    _, _, url = two
    async with httpx.AsyncClient(base_url=f"{url}/fabric/v1", trust_env=False) as client:
        passed = await client.post("/workers", json=WORKER, headers=MEMBER | {"x-inferq-forwarded": "1"})
        assert (passed.status_code, passed.json()["error"]["code"]) == (503, "manager_unavailable")
        assert (await client.post("/workers", json=WORKER)).status_code == 401


async def test_a_standby_follows_nobody_who_does_not_prove_the_join_token() -> None:
    """[A7] What somebody else wrote into Redis gets no call, and so no join token."""
    queue = FakeQueue(holder="somebody", term=1, address=("http://127.0.0.1:9", "0" * 64))
    async with serving(queue) as (standby, url):
        await eventually(lambda: "standing by" in standby.not_ready()[0], "it stands by")
        assert standby.acting_manager.url == ""
        async with httpx.AsyncClient(base_url=f"{url}/fabric/v1", headers=MEMBER, trust_env=False) as client:
            assert (await client.post("/workers", json=WORKER)).status_code == 503


async def test_a_standby_reports_the_death_of_its_worker_to_the_acting_manager(
    two: tuple[ManagerService, ManagerService, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """[A7] A worker may hold its connection open to any Manager."""
    acting, _, url = two
    told: list[str] = []

    async def check(worker_id: str, _session_id: str) -> None:
        told.append(worker_id)

    monkeypatch.setattr(acting, "check", check)
    async with httpx.AsyncClient(base_url=f"{url}/fabric/v1", headers=MEMBER, trust_env=False) as client:
        async with client.stream("GET", f"/workers/w/session?session_id={WORKER['session_id']}") as held:
            assert held.status_code == 200
        await eventually(lambda: told == ["w"], "the acting Manager was told")
