"""Batches whose window is too short for their lines, by the rate at which their model was served."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from queue_schemas import Assignment, EngineState, Outcome, WorkerInfo
from scheduling.batch_urgency import INFEASIBLE_LOAD, load_alone
from scheduling.cost import estimate_cost
from storage import Batch, BatchStatus
from tests.support.batches import ENDPOINT, line
from tests.support.queue import answer_frame, make_job

from .scene import Scene, opened

LINE_S = 10
"""How long a line has a slot."""
SLOTS = 4
LINES = 60
"""Their time, alone on all slots: 150 s."""
ALONE_S = LINES * LINE_S / SLOTS
COST = estimate_cost(ENDPOINT, json.dumps(line(0)).encode(), line(0)["body"])


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with opened(tmp_path) as scene:
        yield scene


async def serve_some(scene: Scene, jobs: int = 20, slots: int = SLOTS) -> None:
    """A worker has run jobs that cost what a line costs, and runs another now."""
    for number in range(jobs + 1):
        await scene.broker.jobs.enqueue(make_job(model="sim", cost_estimate=COST))
        (lease,) = await scene.worker.claim(1, models=["sim"])
        if number < jobs:
            await scene.broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease), run_ms=LINE_S * 1000)
    await show_worker(scene, slots)


async def show_worker(scene: Scene, slots: int) -> None:
    """The registry tells of a worker with so many slots."""
    info = WorkerInfo(
        worker_id="w1",
        session_id=scene.worker.session_id,
        models=["sim"],
        slots=slots,
        engine=EngineState.READY,
        assignment=Assignment(term=1, version=1),
    )
    await scene.broker.fleet.save_workers([info], [])


async def begun(scene: Scene, window_s: float, **fields: Any) -> Batch:
    """A batch that has begun, or was refused."""
    lines = (line(number) for number in range(LINES))
    batch_id = scene.submit(lines, window_s=int(window_s), **fields)
    for _ in range(20):
        batch = await scene.step(batch_id)
        scene.now += 1
        if batch.ended or batch.progress.status is BatchStatus.IN_PROGRESS:
            return batch
    raise AssertionError("it did not begin")


async def test_a_batch_that_cannot_end_in_time_fails_at_its_start(scene: Scene) -> None:
    """No line is sent; the error says how long they take and what to do."""
    await serve_some(scene)
    batch = await begun(scene, ALONE_S / INFEASIBLE_LOAD * 0.8)
    assert batch.progress.status is BatchStatus.FAILED
    (error,) = batch.progress.errors
    assert (error.code, error.param) == ("window_infeasible", "completion_window")
    assert "inferq_allow_late" in error.message
    (depths,) = (await scene.broker.stats.depths()).values()
    assert sum(depth.waiting for depth in depths.values()) == 0


async def test_a_fleet_that_is_small_for_a_moment_fails_no_batch(scene: Scene) -> None:
    """Workers that start anew come back, and slots follow the load of their engines: it is looked at again for a
    while."""
    await serve_some(scene, slots=1)
    batch_id = scene.submit((line(number) for number in range(LINES)), window_s=200)
    for _ in range(10):
        batch = await scene.step(batch_id)
        scene.now += 1
    assert batch.progress.status is BatchStatus.VALIDATING
    await show_worker(scene, SLOTS)
    assert (await scene.step(batch_id)).progress.status is BatchStatus.IN_PROGRESS


async def test_a_batch_that_may_just_end_in_time_runs(scene: Scene) -> None:
    """Predictions are wrong by a factor at times."""
    await serve_some(scene)
    batch = await begun(scene, ALONE_S / INFEASIBLE_LOAD * 1.3)
    assert batch.progress.status is BatchStatus.IN_PROGRESS


async def test_a_client_may_want_what_there_is_time_for(scene: Scene) -> None:
    """Its metadata says so; other words in it do not."""
    await serve_some(scene)
    allowed = await begun(scene, 30, metadata={"inferq_allow_late": "true"})
    assert allowed.progress.status is BatchStatus.IN_PROGRESS
    refused = await begun(scene, 30, metadata={"inferq_allow_late": "no", "team": "search"})
    assert refused.progress.status is BatchStatus.FAILED


async def test_nothing_is_refused_by_a_rate_that_is_not_known(scene: Scene) -> None:
    """Too few jobs have ended; or an autoscaler may start workers."""
    await serve_some(scene, jobs=3)
    assert (await begun(scene, 30)).progress.status is BatchStatus.IN_PROGRESS
    await serve_some(scene)
    await scene.broker.known_pools.claim("sim", "autoscaler-1", 60_000)
    assert (await begun(scene, 30)).progress.status is BatchStatus.IN_PROGRESS


async def test_an_operator_may_let_all_batches_run(tmp_path: Path) -> None:
    """``refuse_late`` off."""
    async with opened(tmp_path, refuse_late=False) as scene:
        await serve_some(scene)
        assert (await begun(scene, 30)).progress.status is BatchStatus.IN_PROGRESS


def test_the_load_of_a_batch_alone() -> None:
    """Cost times pace, over slots and time left; without slots or time it is large and not a fault."""
    assert load_alone(1_000, ms_per_cost=10, slots=5, time_left_s=4) == 0.5
    assert load_alone(1_000, ms_per_cost=10, slots=0, time_left_s=-1) >= 10_000
