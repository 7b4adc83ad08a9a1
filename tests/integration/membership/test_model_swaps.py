"""Workers with several installed models load what waits, and no request is lost on the way."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

from queue_schemas.keys import WORKERS
from tests.support.fleet import Fleet, Role
from tests.support.servers import Server
from tests.support.waiting import eventually

from .asking import answered, fleet_now

LIMIT_S = 40.0
RULES = json.dumps({model: {"start_s": 0.5} for model in ("a", "b")})
MANAGER = {"placement": RULES}
WORKER = {
    "engine": "sim-process",
    "model": "a",
    "installed_models": "b",
    "slots": 4,
    "sim_mode": "text",
    "sim_answer_tokens": 1_000,
}
LOADS_SLOWLY = {"sim_start_ms": 3_000}


async def started(fleet: Fleet, workers: int, **flags: object) -> None:
    """The whole fleet, each worker with model ``a``."""
    await fleet.manager.start()
    await fleet.router.start()
    for number in range(1, workers + 1):
        fleet.worker(f"worker-{number}", **(WORKER | flags)).process.start()
    await asyncio.gather(*(worker.ready() for worker in fleet.workers))
    await fleet.until_served(workers, "a")


async def swapping(fleet: Fleet, *, engine: str) -> Role:
    """The worker that was told to load ``b``, once its engine is in that state."""
    found: list[str] = []

    async def seen() -> bool:
        for name, worker in (await fleet_now(fleet)).items():
            if worker["assignment"].get("load") == "b" and worker["engine"] == engine:
                found.append(name)
        return bool(found)

    await eventually(seen, f"a worker is to load b, its engine {engine}", limit_s=LIMIT_S, every_s=0.02)
    return next(worker for worker in fleet.workers if worker.name == found[0])


async def loads(role: Role) -> float:
    """How often a worker restarted its engine with another model."""
    lines = (await role.metrics()).splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("inferq_models_loaded_total "))


async def test_workers_load_what_waits(tmp_path: Path, own_valkey: Server) -> None:
    """Both models are listed from the start. Requests for one that nobody serves are held, also where a model without a
    worker is refused, and answered once a worker has loaded it; those for the first one later, too."""
    async with Fleet(tmp_path, own_valkey, manager=MANAGER, router={"on_no_worker": "refuse"}) as fleet:
        await started(fleet, 2)
        models = (await fleet.router.page("/v1/models"))["data"]
        assert [model["id"] for model in models] == ["a", "b"]
        await asyncio.gather(*(answered(fleet, "b") for _ in range(12)))
        now = await fleet_now(fleet)
        assert "b" in [worker["loaded"] for worker in now.values()]
        assert all(worker["models"] in (["a"], ["b"], []) for worker in now.values())
        await asyncio.gather(*(answered(fleet, model) for model in "aabb" for _ in range(3)))


async def test_what_runs_too_long_is_handed_back_and_goes_on_later(tmp_path: Path, own_valkey: Server) -> None:
    """One worker for two models: a stream of the first is interrupted for the second one's waiting request, and goes on
    where it stopped when the worker has loaded the first one again. No attempt counts for that."""
    async with Fleet(tmp_path, own_valkey, manager=MANAGER) as fleet:
        await started(fleet, 1, drain_timeout_ms=300, sim_tokens_per_s=20)
        whole = await answered(fleet, "a", 100)
        long = asyncio.create_task(answered(fleet, "a", 100))
        await eventually(lambda: _leased(fleet, "a"), "the stream runs", limit_s=LIMIT_S)
        await asyncio.gather(*(answered(fleet, "b") for _ in range(3)))
        assert not long.done()
        assert await long == whole
        assert await loads(fleet.workers[0]) == 2


async def _leased(fleet: Fleet, model: str) -> bool:
    return (await fleet.depth(model))["leased"] > 0


async def test_a_worker_killed_while_it_loads_is_replaced(tmp_path: Path, own_valkey: Server) -> None:
    """What waits for the model goes to the next worker."""
    async with Fleet(tmp_path, own_valkey, manager=MANAGER) as fleet:
        await started(fleet, 2, **LOADS_SLOWLY)
        waiting = [asyncio.create_task(answered(fleet, "b")) for _ in range(3)]
        (await swapping(fleet, engine="starting")).process.kill()
        await asyncio.gather(*waiting)
        await answered(fleet, "a")


async def test_a_worker_that_is_told_to_end_while_it_loads_ends(tmp_path: Path, own_valkey: Server) -> None:
    """SIGTERM, while its engine starts: it ends in good order, and the next worker loads the model."""
    async with Fleet(tmp_path, own_valkey, manager=MANAGER) as fleet:
        await started(fleet, 2, **LOADS_SLOWLY)
        waiting = [asyncio.create_task(answered(fleet, "b")) for _ in range(3)]
        ending = await swapping(fleet, engine="starting")
        ending.process.send(signal.SIGTERM)
        assert await ending.ended() == 0
        await asyncio.gather(*waiting)
        await answered(fleet, "a")


async def test_a_worker_that_is_told_to_end_while_its_last_jobs_run_loads_nothing(
    tmp_path: Path, own_valkey: Server
) -> None:
    """SIGTERM, before its engine is restarted: what runs finishes, and no other engine is started."""
    async with Fleet(tmp_path, own_valkey, manager=MANAGER) as fleet:
        await started(fleet, 1, sim_tokens_per_s=10)
        long = asyncio.create_task(answered(fleet, "a", 60))
        await eventually(lambda: _leased(fleet, "a"), "the stream runs", limit_s=LIMIT_S)
        other = asyncio.create_task(answered(fleet, "b"))
        ending = await swapping(fleet, engine="ready")
        ending.process.send(signal.SIGTERM)
        assert await ending.ended() == 0
        await long
        engine_starts = [line for line in ending.process.log_tail(500).splitlines() if "engine_starting" in line]
        assert len(engine_starts) == 1
        await fleet.worker("worker-2", **WORKER).start()
        await other


async def test_the_manager_dies_while_a_worker_loads(tmp_path: Path, own_valkey: Server) -> None:
    """The swap goes on without it. The next one knows what it was told, and lets it pull that: it loads once."""
    async with Fleet(tmp_path, own_valkey, manager=MANAGER) as fleet:
        await started(fleet, 1, **LOADS_SLOWLY)
        waiting = asyncio.create_task(answered(fleet, "b"))
        worker = await swapping(fleet, engine="starting")
        fleet.manager.process.kill()
        await fleet.manager.start()
        await waiting
        now = (await fleet_now(fleet))["worker-1"]
        assert (now["assignment"]["load"], now["loaded"]) == ("b", "b")
        assert await loads(worker) == 1


async def test_a_manager_that_forgot_the_fleet_lets_a_swap_end(tmp_path: Path, own_valkey: Server) -> None:
    """The registry is lost with the Manager: the worker registers with what it loads, and serves that."""
    async with Fleet(tmp_path, own_valkey, manager=MANAGER) as fleet:
        await started(fleet, 1, **LOADS_SLOWLY)
        waiting = asyncio.create_task(answered(fleet, "b"))
        worker = await swapping(fleet, engine="starting")
        fleet.manager.process.kill()
        await asyncio.to_thread(own_valkey.ask, "DEL", WORKERS)
        await fleet.manager.start()
        await waiting
        now = (await fleet_now(fleet))["worker-1"]
        assert (now["assignment"].get("load", ""), now["loaded"]) == ("", "b")
        assert await loads(worker) == 1
