"""Whether another worker takes jobs of a model."""

from __future__ import annotations

from typing import Any, cast

import pytest

from broker import Broker
from queue_schemas import (
    Assignment,
    BrokerUnavailable,
    EngineState,
    InferqError,
    Pool,
    WorkerInfo,
    WorkerState,
    new_session_id,
)
from worker import peers
from worker.peers import Peers

ME = new_session_id("me")


class Registry:
    """The registry in Redis; counts how often it is read."""

    def __init__(self, *workers: WorkerInfo) -> None:
        self.fleet = self
        self.workers = workers
        self.error: InferqError | None = None
        self.looks = 0

    async def load_workers(self) -> dict[str, WorkerInfo]:
        self.looks += 1
        if self.error is not None:
            raise self.error
        return {info.worker_id: info for info in self.workers}


def worker(name: str, **fields: Any) -> WorkerInfo:
    defaults = {"session_id": new_session_id(name), "models": ["m"], "engine": EngineState.READY}
    return WorkerInfo(worker_id=name, assignment=Assignment(term=1, version=1), **(defaults | fields))


def peers_of(registry: Registry) -> Peers:
    return Peers(cast(Broker, registry), ME)


@pytest.mark.parametrize(
    ("other", "serves"),
    [
        ({}, True),
        ({"models": ["another"]}, False),
        ({"engine": EngineState.FAILED}, False),
        ({"state": WorkerState.DRAINING}, False),
        ({"state": WorkerState.UNRESPONSIVE}, False),
        ({"broker_ok": False}, False),
    ],
)
async def test_another_worker_counts_if_it_takes_jobs_of_the_model(other: dict[str, Any], serves: bool) -> None:
    """[C8] One that drains, cannot be heard or whose engine is away is no place to go to."""
    registry = Registry(worker("me", session_id=ME), worker("other", **other))
    assert await peers_of(registry).is_served_elsewhere(Pool("m")) is serves


async def test_a_worker_is_alone_if_the_registry_lists_no_other() -> None:
    """[C8] This worker itself is not elsewhere."""
    assert not await peers_of(Registry(worker("me", session_id=ME))).is_served_elsewhere(Pool("m"))


async def test_without_a_usable_registry_other_workers_are_assumed() -> None:
    """[C8] Redis is away, or the registry does not know even this worker: jobs are tried elsewhere as ever."""
    away = Registry()
    away.error = BrokerUnavailable("away")
    assert await peers_of(away).is_served_elsewhere(Pool("m"))
    assert await peers_of(Registry(worker("other", models=["another"]))).is_served_elsewhere(Pool("m"))


async def test_the_registry_is_read_once_for_many_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """[C8] An engine that fails all its requests costs Redis one look a second."""
    monkeypatch.setattr(peers, "CACHE_S", 60.0)
    registry = Registry(worker("me", session_id=ME))
    alone = peers_of(registry)
    assert not any([await alone.is_served_elsewhere(Pool("m")) for _ in range(100)])
    assert registry.looks == 1
