"""A serving fleet whose Managers come and go: nobody who asks for an answer sees it."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from tests.integration.membership.scene import WAIT_LIMIT_S, TwoManagers
from tests.support.fleet import MODEL, Fleet, Role
from tests.support.load import DIMENSIONS, Load
from tests.support.servers import Server
from tests.support.waiting import eventually


async def test_requests_are_answered_while_managers_change(tmp_path: Path, own_valkey: Server) -> None:
    """Mixed requests at both Routers while the acting Manager is told to stop, comes back, and the other is killed: no
    error, no mixed-up answer, and the workers end up where the acting one is."""
    async with TwoManagers(tmp_path, own_valkey) as fleet:
        await fleet.up(workers=2, sim_embedding_dimensions=DIMENSIONS)
        loads = [Load(router.url, 10**6, 4) for router in fleet.routers]
        for router in fleet.routers:
            await _until_served(router)
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(load.run()) for load in loads]
            fleet.managers[0].process.send(signal.SIGTERM)
            await fleet.settled_at(1)
            assert await fleet.managers[0].ended() == 0
            fleet.managers[0].process.start()
            await eventually(lambda: fleet.stands_by(0), "the first one stands by", limit_s=WAIT_LIMIT_S)
            fleet.managers[1].process.kill()
            await fleet.settled_at(0)
            for load in loads:
                await _goes_on(load)
            for task in running:
                task.cancel()
        assert [wrong for load in loads for wrong in load.wrong] == []


async def _until_served(router: Role) -> None:
    async def served() -> bool:
        return (await router.get(f"/v1/models/{MODEL}"))[0] == 200

    await eventually(served, f"{router.name} serves", limit_s=WAIT_LIMIT_S)


async def _goes_on(load: Load) -> None:
    enough = load.done + 20
    await eventually(lambda: load.done >= enough, "requests are answered", limit_s=WAIT_LIMIT_S)


async def test_a_worker_restarted_while_no_manager_was_there_comes_back(tmp_path: Path, own_valkey: Server) -> None:
    """It could say goodbye to nobody, so the next Manager finds it in the snapshot: that keeps no newcomer of its id
    out."""
    async with Fleet(tmp_path, own_valkey, manager={"unresponsive_after_ms": 20_000}) as fleet:
        await fleet.up(workers=1)
        worker = fleet.workers[0]
        fleet.manager.process.kill()
        worker.process.send(signal.SIGTERM)
        assert await worker.ended() == 0
        await fleet.manager.start()
        await worker.start()
        await fleet.until_served(1)
