"""Two Managers on one queue, started in any order: workers join through any way in, and go on when one dies."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fleet import Fleet, Role
from tests.support.servers import Server
from tests.support.waiting import eventually

TOKEN = "a-long-join-token-for-this-test"
MEMBER = {"x-inferq-join-token": TOKEN}
FAST = {"leader_lease_ms": 900}


@pytest.fixture
async def fleet(tmp_path: Path, valkey: Server) -> AsyncIterator[Fleet]:
    env = {"INFERQ_JOIN_TOKEN": TOKEN}
    async with Fleet(tmp_path, valkey, manager=FAST, env=env) as fleet:
        yield fleet


async def _acts(manager: Role) -> bool:
    return (await manager.get("/readyz"))[0] == 200


def _start(*roles: Role) -> None:
    for role in roles:
        role.process.start()


@pytest.mark.parametrize("given", ["the standby", "both, the standby first"])
async def test_workers_register_through_a_router_whichever_manager_it_was_given(fleet: Fleet, given: str) -> None:
    """[A7] A worker that knows only the Router is registered and served, whichever Manager acts and is named; and it is
    so again, through the same Router, once the acting Manager was killed."""
    first, second = fleet.manager, fleet.another_manager("manager-2")
    urls = [second.url] if given == "the standby" else [second.url, first.url]
    fleet.router = fleet.another_router("router-a", manager_url=",".join(urls))
    await first.start()
    _start(second, fleet.router, fleet.worker("w1", manager_url=fleet.router.url))
    await fleet.router.ready()
    await second.ready("/healthz")
    await fleet.until_served(1)
    before = await _fleet_of(fleet)

    first.process.kill()

    async def another_knows_it() -> bool:
        now = await _fleet_of(fleet)
        return now["manager"] not in ("", before["manager"]) and [one["worker_id"] for one in now["workers"]] == ["w1"]

    await eventually(another_knows_it, "the second Manager knows the worker", limit_s=20)


async def _fleet_of(fleet: Fleet) -> dict[str, Any]:
    """The list of workers, asked through the Router."""
    async with fleet.session.get(f"{fleet.router.url}/fabric/v1/workers", headers=MEMBER) as answer:
        page: dict[str, Any] = await answer.json()
        return page if answer.status == 200 else {"manager": "", "workers": []}


async def test_a_worker_that_knows_only_the_standby_manager_is_registered(fleet: Fleet) -> None:
    """[A7] A Manager that stands by passes registrations and heartbeats on to the one that acts."""
    await fleet.manager.start()
    standby = fleet.another_manager("manager-2")
    _start(standby)
    await standby.ready("/healthz")
    worker = await fleet.worker("w1", manager_url=standby.url).start()
    await eventually(lambda: _status_is_registered(fleet, worker), "it is registered", limit_s=15)
    assert not await _acts(standby)


async def _status_is_registered(fleet: Fleet, worker: Role) -> bool:
    async with fleet.session.get(f"{worker.url}/status", headers=MEMBER) as answer:
        page: dict[str, Any] = await answer.json()
    return bool(page["ready"]) and bool(page["assignment"][0])


async def test_a_router_says_that_no_manager_acts_and_stays_ready(fleet: Fleet) -> None:
    """[A7] Without an acting Manager a Router is ready, for requests need none; its page warns that none can join."""
    _start(fleet.manager, fleet.router)
    await fleet.manager.ready()
    await fleet.router.ready()
    assert (await fleet.router.page("/readyz")) == {"ready": True, "reasons": []}
    fleet.manager.process.kill()

    async def warned() -> bool:
        assert await _fleet_of(fleet) == {"manager": "", "workers": []}
        status, body = await fleet.router.get("/readyz")
        return status == 200 and b"workers cannot join" in body and fleet.manager.url.encode() not in body

    await eventually(warned, "the Router warns", limit_s=10)
