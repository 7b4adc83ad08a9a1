"""How much of what workers send is in memory at a time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import orjson
import pytest

from queue_schemas import OverCapacity
from router.workers import calls as module
from router.workers.calls import SESSION_CALLS, CallAnswer, WorkerCalls
from router.workers.credentials import WorkerCredentials
from router.workers.rules import WorkerScope
from router.workers.service import WorkerService


class Service:
    """Answers output and claims once ``answered`` is set."""

    def __init__(self) -> None:
        self.answered = asyncio.Event()

    def admit(self, _: WorkerScope, session_id: str) -> str:
        return session_id

    async def output(self, _: str, attempts: list[Any]) -> list[str]:
        await self.answered.wait()
        return ["ok"] * len(attempts)

    async def claim(self, *_: object) -> dict[str, Any]:
        await self.answered.wait()
        return {}


async def test_output_counts_until_the_queue_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a call that is held without any counts while it is read alone."""
    monkeypatch.setattr(module, "MAX_OPEN_BYTES", 10_000)
    service = Service()
    credentials = SimpleNamespace(scope=lambda _: WorkerScope.unlimited())
    calls = WorkerCalls(cast(WorkerService, service), cast(WorkerCredentials, credentials))

    def send(name: str, message: dict[str, Any]) -> asyncio.Task[CallAnswer]:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": orjson.dumps(message)}

        return asyncio.ensure_future(calls.answer(SESSION_CALLS[name], "w.0", {}, receive, "req_1"))

    piece = {"attempts": [{"lease": "l", "seq": 1, "data": ["x" * 3_000]}]}
    claim = {"after": "0", "more": "x" * 3_000}
    held = [send("claim", claim) for _ in range(9)] + [send("output", piece) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(call.done() for call in held)
    for name, message in (("output", piece), ("claim", claim)):
        with pytest.raises(OverCapacity):
            await send(name, message)
    service.answered.set()
    assert {answer.status for answer in await asyncio.gather(*held)} == {200}
    assert (await send("output", piece)).status == 200
