"""The disk below the append-only file is full: new work is refused clearly, nothing that was taken in is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.support.disks import fill_disk, free_disk, server_with_a_small_disk
from tests.support.fleet import Fleet
from tests.support.waiting import eventually


async def chat(fleet: Fleet, text: str, max_tokens: int = 4) -> tuple[int, str]:
    body = {"model": "sim", "messages": [{"role": "user", "content": text}], "max_tokens": max_tokens}
    async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body) as answer:
        return answer.status, await answer.text()


async def test_a_full_disk_refuses_new_work_and_loses_none(tmp_path: Path) -> None:
    """New requests get 503 that names the cause; running ones are answered once there is room; then all goes on."""
    server = server_with_a_small_disk(tmp_path / "queue")
    try:
        async with Fleet(tmp_path, server) as fleet:
            await fleet.up(workers=1, sim_tokens_per_s=20, sim_mode="text")
            running = [asyncio.create_task(chat(fleet, f"running {n}", max_tokens=40)) for n in range(4)]

            async def leased() -> bool:
                return bool((await fleet.depth())["leased"] == 4)

            await eventually(leased, "the four requests run")
            fill_disk(server)

            # The first that come are still taken in, and wait; Redis notices at its next write.
            late = [asyncio.create_task(chat(fleet, f"late {n}")) for n in range(3)]

            async def refused() -> bool:
                asked = asyncio.create_task(chat(fleet, "too much"))
                done, waiting = await asyncio.wait({asked}, timeout=1)
                late.extend(waiting)
                if not done:
                    return False
                status, text = await asked
                return status == 503 and "broker_full" in text and "disk" in text

            await eventually(refused, "new work is refused", limit_s=20)
            free_disk(server)

            async def taken() -> bool:
                return (await chat(fleet, "room again"))[0] == 200

            await eventually(taken, "new work is taken again", limit_s=30)
            async with asyncio.timeout(40):
                answers = await asyncio.gather(*running)
                late_answers = await asyncio.gather(*late)
            assert [status for status, _ in answers] == [200] * 4
            # Each was either taken in, and answered, or refused: none hangs.
            assert {status for status, _ in late_answers} <= {200, 503}
            assert all(worker.process.running for worker in fleet.workers)
    finally:
        server.stop()
