"""A serving fleet is moved from the HTTP topology into Ray and back: ``python -m tests.runs.moving --seconds 60``."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Mapping

from tests.support.fleet import Fleet, Role
from tests.support.ray_fabric import RayFabric
from tests.support.traffic import Traffic
from tests.support.waiting import eventually

from .report import steps_of, table
from .topologies import open_topologies, parse_seconds

STEPS = 8
"""Between them the fleet serves for a while."""


Took = dict[str, float]
"""Seconds by what took them."""


async def move(fleet: Fleet, ray: RayFabric, traffic: Traffic, dwell_s: float) -> Took:
    """HTTP -> Ray -> HTTP, ``dwell_s`` after each step; each step meets running streams."""
    pids = [worker.process.pid for worker in fleet.workers]
    took = await into_ray(fleet, ray, traffic, dwell_s)
    took |= await into_http(fleet, ray, traffic, dwell_s, ray.down)
    assert [worker.process.pid for worker in fleet.workers if worker.process.running] == pids
    return took


async def into_ray(fleet: Fleet, ray: RayFabric, traffic: Traffic, dwell_s: float) -> Took:
    """HTTP -> Ray: the HTTP Manager and Router end, and the workers are those they were."""
    took: Took = {}
    workers = await registered(fleet.router)

    await next_step(traffic, "inferq ray up", dwell_s)
    begun = time.monotonic()
    told = await ray.up()
    took["inferq ray up"] = time.monotonic() - begun
    assert not told["manager"]["acting"], "two Managers act"

    await next_step(traffic, "clients go to Ray", dwell_s)
    traffic.send_to([ray.url])

    await next_step(traffic, "HTTP Router and Manager stop", dwell_s)
    for role in (fleet.router, fleet.manager):
        role.process.send(signal.SIGTERM)
    begun = time.monotonic()
    await ray.until_acting(workers)
    took["from SIGTERM until Ray's Manager acts for all workers"] = time.monotonic() - begun
    assert await fleet.manager.ended(30) == 0
    assert await fleet.router.ended(60) == 0
    return took


async def into_http(
    fleet: Fleet, ray: RayFabric, traffic: Traffic, dwell_s: float, end: Callable[[], Awaitable[None]]
) -> Took:
    """Ray -> HTTP: ``end`` takes the fabric out of Ray, and the workers are those they were."""
    took: Took = {}
    workers = await ray.acting()
    await next_step(traffic, "HTTP Manager and Router start", dwell_s)
    for role in (fleet.manager, fleet.router):
        role.process.start()
    await fleet.router.ready()
    await eventually(lambda: stands_by(fleet.manager), "the HTTP Manager stands by", limit_s=30)

    await next_step(traffic, "clients go to HTTP", dwell_s)
    traffic.send_to([fleet.router.url])

    await next_step(traffic, "inferq ray down", dwell_s)
    begun = time.monotonic()
    await end()
    took["inferq ray down"] = time.monotonic() - begun
    await fleet.manager.ready()

    await next_step(traffic, "all is in HTTP", dwell_s)
    await traffic.answered(10)
    assert await registered(fleet.router) == workers, "a worker has registered as another one"
    return took


async def serve_http(fleet: Fleet) -> None:
    """Start everything of the HTTP topology."""
    roles = [fleet.manager, fleet.router, *fleet.workers]
    for role in roles:
        role.process.start()
    await asyncio.gather(*(role.ready() for role in roles))
    await fleet.until_served(len(fleet.workers))


async def next_step(traffic: Traffic, name: str, dwell_s: float) -> None:
    """Let the fleet serve for a while, then begin a step in the middle of streams."""
    await asyncio.sleep(dwell_s)
    await traffic.answered(5)
    await traffic.streaming()
    traffic.step(name)


async def registered(router: Role) -> Mapping[str, str]:
    """Sessions by worker, as a Router's page has them."""
    page = await router.page("/fabric/v1/workers")
    return {worker["worker_id"]: worker["session_id"] for worker in page["workers"]}


async def stands_by(manager: Role) -> bool:
    status, body = await manager.get("/readyz")
    return status == 503 and b"standing by: another Manager acts" in body


async def main(seconds: float) -> None:
    """The run at full length, with production's times, and its table."""
    async with open_topologies() as (fleet, ray):
        await serve_http(fleet)
        async with Traffic([fleet.router.url]) as traffic:
            took = await move(fleet, ray, traffic, seconds / STEPS)
        print(table(steps_of(traffic)))
        for what, lasted in took.items():
            print(f"{what}: {lasted:.1f} s")
        wrong = traffic.wrong()
        print(f"{len(traffic.history)} requests, {len(wrong)} wrong", *wrong, sep="\n")
        assert not wrong


if __name__ == "__main__":
    asyncio.run(main(parse_seconds(__doc__)))
