"""One run: ``python -m tests.chaos --seconds 60 --seed 7``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.disks import server_with_a_small_disk

from . import aftermath, faults
from .check import Verdict, check
from .clients import Clients
from .history import Entry, History
from .plan import CALM_S, MIN_S, draw, opening
from .stage import Stage, staged

MUST_PROVE = (
    "fenced", "duplicate", "recovered", "streams migrated", "kill measured", "hang measured", "poison given up",
)  # fmt: skip

APART_S = 1.0
"""Between the faults of the opening."""


@dataclass(frozen=True, slots=True)
class Outcome:
    verdict: Verdict
    entries: Sequence[Entry]


async def play(folder: Path, *, seed: int, seconds: float) -> Outcome:
    """Run the faults of ``seed`` for ``seconds`` and judge what was seen. Logs and history are left in ``folder``."""
    server = server_with_a_small_disk(folder / "queue")
    history = History(folder / "history.jsonl")
    try:
        async with staged(folder, server, history) as stage:
            stage.clients = clients = Clients([role.url for role in stage.routers], history, seed=seed)
            history.begin()
            clients.start()
            try:
                await _do_all(stage, seed, seconds)
            except BaseException:
                clients.abandon()
                raise
            await clients.stop()
            await stage.watched()
            await aftermath.look(stage)
    finally:
        history.close()
        server.stop()
    proves = MUST_PROVE if seconds >= MIN_S else ()
    return Outcome(check(history.entries, must_prove=proves), history.entries)


async def _do_all(stage: Stage, seed: int, seconds: float) -> None:
    history = stage.history
    await asyncio.sleep(CALM_S)
    first = opening(seed, seconds)
    for number, fault in enumerate(first):
        await faults.do(stage, number, fault)
        await asyncio.sleep(APART_S)
    begin_s = history.now_s
    async with asyncio.TaskGroup() as group:
        for number, fault in enumerate(draw(seed, seconds), len(first)):
            await asyncio.sleep(max(0.0, begin_s + fault.at_s - history.now_s))
            group.create_task(faults.do(stage, number, fault))
    await asyncio.sleep(max(CALM_S, seconds - history.now_s))
