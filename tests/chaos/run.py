"""Run chaos once: start the fleet, the clients and the faults, then check the history."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.disks import server_with_a_small_disk

from . import faults, final_state
from .check import Verdict, check
from .clients import Clients
from .fleet import ChaosFleet, started_fleet
from .history import Entry, History
from .plan import CALM_S, MIN_S, draw, opening

MUST_PROVE = (
    "fenced", "duplicate", "recovered", "yielded", "streams migrated", "kill measured", "hang measured",
    "poison given up",
)  # fmt: skip

APART_S = 1.0
"""Between the faults of the opening."""


@dataclass(frozen=True, slots=True)
class Outcome:
    verdict: Verdict
    entries: Sequence[Entry]


async def run_chaos(folder: Path, *, seed: int, seconds: float) -> Outcome:
    """Run the faults of ``seed`` for ``seconds`` and check the history. Logs and history stay in ``folder``."""
    server = server_with_a_small_disk(folder / "queue")
    history = History(folder / "history.jsonl")
    try:
        async with started_fleet(folder, server, history) as fleet:
            fleet.clients = clients = Clients([role.url for role in fleet.routers], history, seed=seed)
            history.begin()
            clients.start()
            try:
                await _inject_all(fleet, seed, seconds)
            except BaseException:
                clients.abort()
                raise
            await clients.stop()
            await fleet.finish_measurements()
            await final_state.record(fleet)
    finally:
        history.close()
        server.stop()
    proves = MUST_PROVE if seconds >= MIN_S else ()
    return Outcome(check(history.entries, must_prove=proves), history.entries)


async def _inject_all(fleet: ChaosFleet, seed: int, seconds: float) -> None:
    history = fleet.history
    await asyncio.sleep(CALM_S)
    first = opening(seed, seconds)
    for number, fault in enumerate(first):
        await faults.inject(fleet, number, fault)
        await asyncio.sleep(APART_S)
    begin_s = history.now_s
    async with asyncio.TaskGroup() as group:
        for number, fault in enumerate(draw(seed, seconds), len(first)):
            await asyncio.sleep(max(0.0, begin_s + fault.at_s - history.now_s))
            group.create_task(faults.inject(fleet, number, fault))
    await asyncio.sleep(max(CALM_S, seconds - history.now_s))
