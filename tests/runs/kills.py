"""Manager and Router in Ray are killed and replaced under traffic: ``python -m tests.runs.kills --seconds 60``."""

from __future__ import annotations

import asyncio
import os
import signal
import time

from tests.support.fleet import Fleet
from tests.support.processes import is_alive
from tests.support.ray_fabric import MANAGER, RayFabric
from tests.support.sockets import Held, held_by, kill_holding
from tests.support.traffic import Traffic
from tests.support.waiting import eventually

from .moving import next_step
from .report import steps_of, table
from .topologies import open_topologies, parse_seconds

STEPS = 6


async def kill(ray: RayFabric, traffic: Traffic, dwell_s: float) -> tuple[Held, dict[str, float]]:
    """SIGKILL and ``ray.kill`` the Manager, SIGKILL a replica, update all of them; each meets running streams.

    What the killed replica held, and the seconds that things took.
    """
    took: dict[str, float] = {}
    workers = await ray.acting()
    assert workers, "nobody acts"

    await next_step(traffic, "Manager's process SIGKILLed", dwell_s)
    took["the Manager acts again after SIGKILL"] = await _manager_replaced(ray, workers, by_ray=False)

    await next_step(traffic, "Manager ray.kill(no_restart=False)", dwell_s)
    took["the Manager acts again after ray.kill"] = await _manager_replaced(ray, workers, by_ray=True)

    await next_step(traffic, "one Router replica SIGKILLed", dwell_s)
    before = ray.replicas()
    begun = time.monotonic()
    victim = max(before, key=lambda pid: len(held_by(pid, ray.port).ports))
    held = kill_holding(victim, ray.port)
    await eventually(
        lambda: len(ray.replicas()) >= len(before) and victim not in ray.replicas(),
        "Serve has replaced the killed replica",
        limit_s=60,
        every_s=0.1,
    )
    took["as many replicas listen again"] = time.monotonic() - begun

    await next_step(traffic, "inferq ray up with a changed setting", dwell_s)
    before = ray.replicas()
    begun = time.monotonic()
    ray.cluster.env["INFERQ_ROUTER_KEEPALIVE_INTERVAL_MS"] = "14000"
    told = await ray.up()
    assert any("Router" in change for change in told["changed"]), told
    await eventually(lambda: not set(before) & set(ray.replicas()), "no old replica listens", limit_s=60, every_s=0.1)
    took["rolling update"] = time.monotonic() - begun

    await next_step(traffic, "everything is new", dwell_s)
    await traffic.answered(10)
    assert await ray.acting() == workers, "a worker has registered as another one"
    return held, took


async def serve_ray(fleet: Fleet, ray: RayFabric) -> None:
    """Start the workers of a fabric whose Manager and Routers are up in Ray."""
    for worker in fleet.workers:
        worker.process.start()
    await asyncio.gather(*(worker.ready() for worker in fleet.workers))

    async def served() -> bool:
        workers = await ray.acting()
        return workers is not None and workers.keys() >= {worker.name for worker in fleet.workers}

    await eventually(served, "all workers are registered in Ray", limit_s=30)


async def _manager_replaced(ray: RayFabric, workers: dict[str, str], *, by_ray: bool) -> float:
    """Kill the Manager; the seconds until another process of it acts, with the same workers in the same life."""
    (old,) = ray.cluster.processes(MANAGER)
    if by_ray:
        await ray.kill_manager_actor()
    else:
        os.kill(old, signal.SIGKILL)
    begun = time.monotonic()

    async def replaced() -> bool:
        return not is_alive(old) and await ray.acting() == workers

    await eventually(replaced, "another Manager acts for the same workers", limit_s=60, every_s=0.05)
    return time.monotonic() - begun


async def main(seconds: float) -> None:
    """The run at full length, with production's times, and its table."""
    async with open_topologies() as (fleet, ray):
        await ray.up()
        await serve_ray(fleet, ray)
        async with Traffic([ray.url]) as traffic:
            held, took = await kill(ray, traffic, seconds / STEPS)
        print(table(steps_of(traffic, [held])))
        for what, lasted in took.items():
            print(f"{what}: {lasted:.1f} s")
        wrong = traffic.wrong(held)
        print(f"{len(traffic.history)} requests, {len(wrong)} wrong", *wrong, sep="\n")
        assert not wrong


if __name__ == "__main__":
    asyncio.run(main(parse_seconds(__doc__)))
