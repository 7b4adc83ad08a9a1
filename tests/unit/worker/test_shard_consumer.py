"""Jobs that are handed to a worker by its control stream: run, given back, or known as unreadable."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from queue_schemas import Assignment, Claimed, Control, ControlKind, Lease, PoolAssignment, SessionId, parse_control
from tests.support.queue import make_job
from worker.core import Slots
from worker.shard_consumer import ShardConsumer


class Scene:
    """A consumer of a worker in region "eu" with two slots, parked and offering both; what it runs and gives back."""

    def __init__(self) -> None:
        self.started: list[Lease] = []
        self.released: list[Lease] = []
        self.remote: Counter[str] = Counter()
        self.slots = Slots(2, ready=True)
        self.slots.assign(Assignment(term=1, version=1, pools=[PoolAssignment(pool="m", shard=0)]))
        claim = self.slots.next_claim(0, 0.0)
        assert claim is not None
        self.slots.answered(claim, Claimed(parked=True, offered=2), asyncio.get_running_loop().time())

        async def release(lease: Lease, _reason: str, *, counted: bool) -> None:
            assert not counted
            self.released.append(lease)

        def start(leases: Sequence[Lease], _group: asyncio.TaskGroup) -> None:
            self.started += leases

        def remote(_model: str, region: str) -> None:
            self.remote.update([region])

        self.asked: list[str] = []
        attempts = SimpleNamespace(start=start, has=lambda attempt: attempt in {one.attempt_id for one in self.started})
        self.context = context = SimpleNamespace(
            settings=SimpleNamespace(region="eu"),
            metrics=SimpleNamespace(remote=remote),
            drain=asyncio.Event(),
            switching=None,
        )
        parts: list[Any] = [SimpleNamespace(attempts=SimpleNamespace(release=release)), SessionId("w"), self.slots]
        self.consumer = ShardConsumer(
            0,
            *parts,
            attempts,
            context,
            reachable=lambda *_: None,
            answer_ping=lambda: None,
            preemption=SimpleNamespace(ask=self._ask),  # type: ignore[arg-type]
        )

    async def _ask(self, attempt_id: str, shard: int) -> None:
        assert shard == 0
        self.asked.append(attempt_id)

    async def tell(self, *leases: Lease | None) -> None:
        """Messages come that hand over ``leases``."""
        async with asyncio.TaskGroup() as group:
            for lease in leases:
                self.consumer._handle_control(Control(ControlKind.JOB, lease=lease), group)


@pytest.fixture
async def scene() -> Scene:
    return Scene()


def lease(attempt_id: str = "one", region: str = "") -> Lease:
    return Lease(make_job(region=region), 1, attempt_id, 1, 1_000, 0)


async def test_a_handed_job_runs_in_a_slot_of_its_own(scene: Scene) -> None:
    """A message that is read twice starts it once."""
    job = lease()
    await scene.tell(job, job)
    assert (scene.started, scene.slots.busy, scene.slots.free) == ([job], 1, 0)


async def test_a_job_of_another_region_is_counted(scene: Scene) -> None:
    """However it came."""
    await scene.tell(lease("one", "eu"), lease("two", "us"))
    assert scene.remote == {"us": 1}


async def test_a_worker_that_drains_gives_back_what_it_is_handed(scene: Scene) -> None:
    """Uncounted, and its slot is free again."""
    scene.slots.draining = True
    job = lease()
    await scene.tell(job)
    assert (scene.started, scene.released, scene.slots.busy) == ([], [job], 0)


async def test_an_engine_that_loaded_another_model_runs_no_job_of_the_last_one(scene: Scene) -> None:
    """A job that was on its way meanwhile goes back uncounted; those of the new model run."""
    late, own = lease("one"), lease("two")
    scene.context.switching = SimpleNamespace(models=("other",))
    await scene.tell(late)
    assert (scene.started, scene.released, scene.slots.busy) == ([], [late], 0)
    scene.context.switching = SimpleNamespace(models=(own.job.model,))
    await scene.tell(own)
    assert (scene.started, scene.slots.busy) == ([own], 1)


async def test_jobs_of_an_adapter_that_is_not_there_go_back(scene: Scene) -> None:
    """It was unloaded while they were on their way."""
    late, own = lease("one"), lease("two")
    lacking = {late.job.model}
    scene.consumer._adapters = SimpleNamespace(lacks=lacking.__contains__)  # type: ignore[assignment]
    await scene.tell(late)
    assert (scene.started, scene.released, scene.slots.busy) == ([], [late], 0)
    lacking.clear()
    await scene.tell(own)
    assert (scene.started, scene.slots.busy) == ([own], 1)


async def test_what_cannot_be_read_costs_no_slot(scene: Scene) -> None:
    """It was one of those offered: were it not counted, the worker would claim one too few for ever."""
    await scene.tell(None, None)
    assert (scene.slots.busy, scene.slots.free) == (0, 2)
    claim = scene.slots.next_claim(0, 0.0)
    assert claim is not None
    assert (claim.n, claim.received) == (2, 2)


async def test_a_yield_is_passed_on(scene: Scene) -> None:
    """By the attempt that it names."""
    async with asyncio.TaskGroup() as group:
        message = parse_control({b"k": b"yield", b"job": lease().job.id.encode(), b"aid": b"one"})
        assert message is not None
        scene.consumer._handle_control(message, group)
    assert scene.asked == ["one"]
