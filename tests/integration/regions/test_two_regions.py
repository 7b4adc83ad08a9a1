"""Two regions on one Redis, real processes in each, the far one behind a slow link: near first, far never wasted."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.fault_proxy import FaultProxy
from tests.support.fleet import MODEL, Fleet, Role
from tests.support.servers import Server
from tests.support.waiting import eventually

REMOTE_AFTER_S = 1.5
LEASE_S = 3.0
"""Of a fleet's workers: how long until one of them stands in for a Manager that is gone."""
DELAY_S = 0.03
"""Of the far region's link to Redis, in each direction."""
TOKENS_PER_S = 20
LONG = "word " * 200
"""Runs for ten seconds."""
SLOTS = 2


@dataclass
class Scene:
    """A Router and a worker in each of two regions; ``us`` is the far one."""

    fleet: Fleet
    routers: dict[str, Role]
    workers: dict[str, Role]

    async def ask(self, region: str, text: str) -> float:
        """One request at a region's Router; how long its answer, which must be right, took."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
        begin = time.monotonic()
        url = f"{self.routers[region].url}/v1/chat/completions"
        async with self.fleet.session.post(url, json=body) as answer:
            assert answer.status == 200, await answer.text()
            assert (await answer.json())["choices"][0]["message"]["content"] == text
        return time.monotonic() - begin

    async def from_other_regions(self, worker: str) -> int:
        """How many jobs of other regions a worker has claimed."""
        page = await self.workers[worker].metrics()
        return int(sum(map(float, re.findall(r"inferq_jobs_from_remote_regions_total\{[^}]*\} (\S+)", page))))

    async def all_run(self, jobs: int) -> bool:
        """Whether so many jobs run now, wherever, and none waits."""
        pool = await self.routers["eu"].page(f"/fabric/v1/pools/{MODEL}")
        return (pool["waiting"], pool["leased"]) == (0, jobs)

    async def until_known(self, region: str, workers: int) -> None:
        """Wait until a region's Router counts so many workers."""

        async def counted() -> bool:
            pools = (await self.routers[region].page("/fabric/v1/pools"))["pools"]
            return any(pool["model"] == MODEL and pool["workers"] == workers for pool in pools)

        await eventually(counted, f"{region}'s Router counts {workers} workers", limit_s=30, every_s=0.05)


@pytest.fixture
async def scene(tmp_path: Path, own_valkey: Server) -> AsyncIterator[Scene]:
    async with FaultProxy(own_valkey.port) as far_link, Fleet(tmp_path, own_valkey) as fleet:
        far_link.latency_s = DELAY_S
        links = {"eu": own_valkey.url, "us": far_link.url}
        routers, workers = {}, {}
        for region, redis_url in links.items():
            routers[region] = fleet.another_router(
                f"router-{region}",
                region=region,
                redis_url=redis_url,
                region_remote_after_ms=int(REMOTE_AFTER_S * 1000),
            )
            workers[region] = fleet.worker(
                f"worker-{region}", region=region, redis_url=redis_url, manager_url=fleet.manager.url, slots=SLOTS,
                sim_tokens_per_s=TOKENS_PER_S,
            )  # fmt: skip
        roles = [fleet.manager, *routers.values(), *workers.values()]
        for role in roles:
            role.process.start()
        await asyncio.gather(*(role.ready() for role in roles))
        scene = Scene(fleet, routers, workers)
        for region in links:
            await scene.until_known(region, 2)
        yield scene


async def test_near_capacity_first_and_far_capacity_never_wasted(scene: Scene) -> None:
    """With free slots in its region every job runs there; the others run elsewhere once they have waited, with no
    Manager alive; with the region's worker dead all do. Nothing is lost."""
    for turn in range(4):
        await asyncio.gather(scene.ask("eu", f"eu {turn}"), scene.ask("us", f"us {turn}"))
    assert [await scene.from_other_regions(region) for region in ("eu", "us")] == [0, 0]

    scene.fleet.manager.process.kill()
    begin = time.monotonic()
    long = [asyncio.create_task(scene.ask("eu", LONG)) for _ in range(SLOTS)]
    await eventually(lambda: scene.all_run(SLOTS), "its region runs what fills its slots")
    overflow = await asyncio.gather(*(scene.ask("eu", f"over {number}") for number in range(2 * SLOTS)))
    assert not any(task.done() for task in long), "another region was quicker than waiting"
    assert min(overflow) >= REMOTE_AFTER_S
    assert max(overflow) < REMOTE_AFTER_S + LEASE_S + 3, "a worker stands in for the Manager, and sweeps"
    assert await scene.from_other_regions("us") == 2 * SLOTS
    await asyncio.gather(*long)
    assert time.monotonic() - begin < 30

    scene.workers["eu"].process.kill()
    orphaned = await asyncio.gather(*(scene.ask("eu", f"alone {number}") for number in range(2 * SLOTS)))
    assert max(orphaned) < REMOTE_AFTER_S + 6
    assert await scene.from_other_regions("us") == 4 * SLOTS

    await scene.fleet.manager.start()
    await scene.until_known("eu", 1)

    async def at_once() -> bool:
        return await scene.ask("eu", "now") < REMOTE_AFTER_S

    await eventually(at_once, "nobody waits for a region without workers", limit_s=15)
