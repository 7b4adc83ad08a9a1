"""Workers load and unload LoRA adapters as requests need them, and no request is lost on the way."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.support.adapters import make_adapter, make_adapters
from tests.support.fleet import Fleet, Role
from tests.support.servers import Server
from tests.support.waiting import eventually

from .asking import answered, fleet_now

LIMIT_S = 60.0
WORKER = {"slots": 4, "sim_mode": "text", "sim_answer_tokens": 1_000, "sim_adapter_load_ms": 50}


def adapters(tmp_path: Path, *names: str) -> dict[str, object]:
    """The flags of a worker with a folder of these adapters."""
    return {"adapters_dir": str(make_adapters(tmp_path / "adapters", names))}


async def started(fleet: Fleet, workers: int, **flags: object) -> None:
    """The whole fleet. Its engines refuse more adapters than their workers may hold."""
    room = flags.get("max_adapters", 8)
    await fleet.up(workers, **(WORKER | {"sim_max_adapters": room} | flags))


async def until_listed(fleet: Fleet, name: str, adapter: str) -> None:
    async def listed() -> bool:
        return adapter in (await fleet_now(fleet))[name]["models"]

    await eventually(listed, f"{name} has {adapter}", limit_s=LIMIT_S, every_s=0.05)


async def changes(role: Role) -> Counter[str]:
    """How often a worker's engine loaded, unloaded, or could not load an adapter."""
    lines = (line for line in (await role.metrics()).splitlines() if line.startswith("inferq_adapter_changes_total{"))
    return Counter({line.split('"')[1]: int(float(line.split()[-1])) for line in lines})


async def test_adapters_are_loaded_on_demand(tmp_path: Path, own_valkey: Server) -> None:
    """Clients see them from the start, also where a model without a worker is refused, and each is loaded once it is
    asked for. A folder that appears later is found."""
    async with Fleet(tmp_path, own_valkey, router={"on_no_worker": "refuse"}) as fleet:
        await started(fleet, 2, **adapters(tmp_path, "x", "y", "z"))
        models = (await fleet.router.page("/v1/models"))["data"]
        assert [model["id"] for model in models] == ["sim", "x", "y", "z"]
        assert await changes(fleet.workers[0]) == {}
        texts = await asyncio.gather(*(answered(fleet, model) for model in ("x", "y", "x", "sim")))
        assert texts[0] == texts[2]
        held = [model for worker in (await fleet_now(fleet)).values() for model in worker["models"] if model != "sim"]
        assert sorted(set(held)) == ["x", "y"]
        async with fleet.session.post(
            f"{fleet.router.url}/v1/chat/completions", json={"model": "unheard-of", "messages": []}
        ) as answer:
            assert answer.status == 404
        make_adapter(tmp_path / "adapters", "new")

        async def listed() -> bool:
            return "new" in [model["id"] for model in (await fleet.router.page("/v1/models"))["data"]]

        await eventually(listed, "the new adapter is known", limit_s=LIMIT_S, every_s=0.2)
        await answered(fleet, "new")


async def test_more_adapters_than_room_take_turns(tmp_path: Path, own_valkey: Server) -> None:
    """Room for two on the only worker, requests for five at once: all are answered, and the engine, which refuses a
    third adapter, never refused one."""
    names = [f"adapter-{number}" for number in range(5)]
    async with Fleet(tmp_path, own_valkey) as fleet:
        await started(fleet, 1, max_adapters=2, **adapters(tmp_path, *names))
        await asyncio.gather(*(answered(fleet, name) for name in names for _ in range(3)))
        seen = await changes(fleet.workers[0])
        assert seen["loaded"] >= 5
        assert seen["loaded"] - seen["unloaded"] <= 2
        assert seen["failed"] == 0


async def test_an_adapter_is_unloaded_once_its_stream_has_ended(tmp_path: Path, own_valkey: Server) -> None:
    """Room for one: a request for another one waits for the turn to end, and then for the stream."""
    async with Fleet(tmp_path, own_valkey) as fleet:
        await started(fleet, 1, max_adapters=1, **adapters(tmp_path, "x", "y"), sim_tokens_per_s=10)
        long = asyncio.create_task(answered(fleet, "x", 260))  # longer than a turn

        async def runs() -> bool:
            return bool((await fleet.depth("x"))["leased"])

        await eventually(runs, "the stream runs", limit_s=LIMIT_S)
        other = asyncio.create_task(answered(fleet, "y"))

        async def draining() -> bool:
            worker = (await fleet_now(fleet))["worker-1"]
            return worker["assignment"]["adapters"] == ["y"] and "x" in worker["models"]

        await eventually(draining, "the worker is to unload x", limit_s=LIMIT_S, every_s=0.05)
        assert not long.done()
        pools = [part["pool"] for part in (await fleet_now(fleet))["worker-1"]["assignment"]["pools"]]
        assert pools == ["sim"]
        await long
        assert not other.done()
        await other
        assert (await changes(fleet.workers[0]))["unloaded"] == 1


async def test_what_runs_too_long_is_handed_back_and_goes_on_later(tmp_path: Path, own_valkey: Server) -> None:
    """A stream that outlasts ``drain_timeout_ms`` makes room, and goes on where it stopped."""
    async with Fleet(tmp_path, own_valkey) as fleet:
        flags = adapters(tmp_path, "x", "y") | {"max_adapters": 1, "drain_timeout_ms": 300, "sim_tokens_per_s": 10}
        await started(fleet, 1, **flags)
        long = asyncio.create_task(answered(fleet, "x", 240))
        await until_listed(fleet, "worker-1", "x")
        await answered(fleet, "y")
        assert not long.done()
        assert len((await long).split()) > 160


@pytest.mark.parametrize("how", ["worker", "engine", "manager"])
async def test_what_dies_is_replaced(how: str, tmp_path: Path, own_valkey: Server) -> None:
    """A worker killed while it serves an adapter: another one loads it. An engine that crashes: it is given its
    adapters again. A Manager: the next one goes on with what was told."""
    async with Fleet(tmp_path, own_valkey) as fleet:
        count = 2 if how == "worker" else 1
        await started(fleet, count, **adapters(tmp_path, "x", "y"), engine="sim-process", sim_tokens_per_s=20)
        await answered(fleet, "x", 1)
        now = await fleet_now(fleet)
        [holder] = [worker for worker in fleet.workers if "x" in now[worker.name]["models"]]
        running = [asyncio.create_task(answered(fleet, "x", 60)) for _ in range(3)]
        if how == "worker":
            holder.process.kill()
        elif how == "manager":
            fleet.manager.process.kill()
            await fleet.manager.start()
        else:
            body = {
                "model": "sim",
                "messages": [{"role": "user", "content": "crash"}],
                "sim": {"fail": "crash", "times": 1},
            }
            async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body) as answer:
                await answer.read()
        await asyncio.gather(*running)
        await answered(fleet, "y")
        await answered(fleet, "x")
        if how == "manager":
            assert (await changes(holder))["loaded"] == 2


async def test_an_adapter_that_cannot_be_loaded_costs_others_nothing(tmp_path: Path, own_valkey: Server) -> None:
    """It is tried again ever more rarely, while others are served, and served once it can be loaded. The Manager's list
    of workers and the logs say why."""
    async with Fleet(tmp_path, own_valkey) as fleet:
        flags = adapters(tmp_path, "x")
        broken = make_adapter(tmp_path / "adapters", "broken", {"fail": 500})
        await started(fleet, 1, max_adapters=2, **flags)
        waiting = asyncio.create_task(answered(fleet, "broken"))
        worker = fleet.workers[0]

        async def failed() -> bool:
            return (await changes(worker))["failed"] >= 2

        while not await failed():
            await answered(fleet, "x")
        assert (await changes(worker))["failed"] == 2
        assert "A failure that was ordered" in fleet.manager.process.log_tail(500)
        shutil.rmtree(broken)
        make_adapter(tmp_path / "adapters", "broken")
        await waiting


async def test_an_engine_that_loads_no_adapters_is_asked_once(tmp_path: Path, own_valkey: Server) -> None:
    """Its worker says so, and is told none from then on; the base model is served."""
    async with Fleet(tmp_path, own_valkey) as fleet:
        await started(fleet, 1, **adapters(tmp_path, "x", "y"), sim_no_adapter_updates=True)
        waiting = [asyncio.create_task(answered(fleet, name)) for name in ("x", "y")]
        worker = fleet.workers[0]

        async def told() -> bool:
            return "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in worker.process.log_tail(500)

        await eventually(told, "the worker says what is missing", limit_s=LIMIT_S, every_s=0.1)
        for _ in range(20):
            await answered(fleet, "sim")
        assert 1 <= (await changes(worker))["failed"] <= 2
        assert (await fleet_now(fleet))["worker-1"]["assignment"]["adapters"] == []
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_thousand_adapters_on_three_workers(tmp_path: Path, own_valkey: Server) -> None:
    """All are known; requests for fifty of them at once are answered with room for 24, and what Redis, Manager and
    Routers hold of them is their names, once."""
    names = [f"adapter-{number:04}" for number in range(1_000)]
    async with Fleet(tmp_path, own_valkey) as fleet:
        await started(fleet, 3, max_adapters=8, slots=8, **(adapters(tmp_path, *names) | {"sim_adapter_load_ms": 10}))
        assert len((await fleet.router.page("/v1/models"))["data"]) == 1_001
        await asyncio.gather(*(answered(fleet, name, 2) for name in names[::20]))
        workers = await fleet_now(fleet)
        assert len({worker["adapter_set"] for worker in workers.values()}) == 1
        assert all(len(json.dumps(worker)) < 16_000 for worker in workers.values())
        for worker in fleet.workers:
            assert (await changes(worker))["failed"] == 0
        size = await asyncio.to_thread(own_valkey.ask, "HLEN", "iq:adapters")
        assert int(size) == 1
