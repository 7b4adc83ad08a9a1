"""How many workers may use a credential, also while they join at once."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from queue_schemas import Assignment, OverCapacity, RegistrationAnswer, new_session_id
from queue_schemas.worker_protocol.messages import Join
from router.ports import ManagerPort, QueuePort
from router.workers import membership as module
from router.workers.membership import Membership, Registry
from router.workers.rules import WorkerScope
from telemetry.http.fabric_calls import FabricCall, Forwarded


class Manager:
    """Takes every worker, after a while."""

    async def forward(self, _: FabricCall) -> Forwarded:
        await asyncio.sleep(0.01)
        answer = RegistrationAnswer(
            shards=1, lease_ms=1_000, heartbeat_interval_ms=100, broker_url="", assignment=Assignment(term=1, version=1)
        )
        return Forwarded(200, (), answer.model_dump_json().encode())


def queue() -> QueuePort:
    async def load_workers() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {}

    return cast(QueuePort, SimpleNamespace(fleet=SimpleNamespace(load_workers=load_workers)))


async def test_workers_that_join_at_once_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the registry lists them; a worker that joins again is no other one, and one that is gone makes room."""
    registry = Registry()
    membership = Membership(cast(ManagerPort, Manager()), "token", registry)
    scope = WorkerScope(name="edge", workers=3)
    empty = queue()

    async def join(number: int) -> object:
        worker_id = f"edge.{number}"
        status = Join(worker_id=worker_id, session_id=new_session_id(worker_id), models=["m"], slots=1)
        return await membership.register(empty, scope, status, "req_1")

    found = await asyncio.gather(*map(join, range(50)), return_exceptions=True)
    assert [isinstance(one, RegistrationAnswer) for one in found] == [True] * 3 + [False] * 47
    assert all(isinstance(one, OverCapacity) for one in found[3:])
    assert isinstance(await join(1), RegistrationAnswer)
    monkeypatch.setattr(module, "JOINING_S", -1.0)
    assert isinstance(await join(7), RegistrationAnswer)
