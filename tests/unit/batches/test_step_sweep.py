"""Every batch that has not ended has its next step on the queue, and no more than one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import fakeredis
import pytest
import redis

from batches import BatchSettings
from batches.rq_jobs import StepJob, StepQueue
from batches.step_runner import step_limit_ms
from batches.step_sweep import ORPHAN_MS
from queue_schemas import BrokerUnavailable
from storage import BatchStatus, BatchStore
from tests.support.batches import ACME, line

from .scene import Scene, opened


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with opened(tmp_path) as scene:
        yield scene


async def test_a_new_batch_is_given_its_first_step_once(scene: Scene) -> None:
    """The Router only writes the record; however often the sweep looks, one step waits."""
    batch_id = scene.submit([line(1)])
    assert scene.sweep.once() == [batch_id]
    assert [scene.sweep.once() for _ in range(3)] == [[], [], []]
    (job_id,) = scene.steps.queue.get_job_ids()
    job = scene.steps.queue.fetch_job(job_id)
    assert job is not None
    assert (job.func_name, job.args) == ("batches.rq_jobs.advance", [ACME, batch_id])
    assert job.description == f"next step ({batch_id} of acme)"


async def test_what_redis_lost_is_put_back(scene: Scene) -> None:
    """FLUSHALL: the second look finds that it is not just between two steps."""
    batch_id = scene.submit([line(1)])
    scene.sweep.once()
    await scene.client().flushall()
    assert scene.sweep.once() == []
    assert scene.sweep.once() == [batch_id]


async def test_a_batch_whose_step_runs_or_that_pauses_is_left_alone(scene: Scene) -> None:
    """Until its lock or its pause is over."""
    batch_id = scene.submit([line(1)])
    scene.steps.lock(batch_id, "token", 60_000)
    assert [scene.sweep.once() for _ in range(3)] == [[], [], []]
    scene.steps.unlock(batch_id, "another's")
    assert scene.sweep.once() == []
    scene.steps.unlock(batch_id, "token")
    scene.steps.pause(batch_id, 60_000)
    assert scene.sweep.once() == []
    assert scene.sweep.once() == []
    scene.steps.forget([batch_id], "pause")
    assert (scene.sweep.once(), scene.sweep.once()) == ([], [batch_id])


async def test_only_one_step_of_a_batch_runs_at_a_time(scene: Scene) -> None:
    """Who finds the lock taken does nothing, and puts nothing on the queue."""
    batch_id = scene.submit([line(1)])
    scene.steps.lock(batch_id, "token", 60_000)
    assert await scene.batcher.advance(ACME, batch_id) == "another step of it runs"
    assert scene.steps.waiting() == set()
    scene.steps.unlock(batch_id, "token")
    await scene.batcher.advance(ACME, batch_id)
    assert scene.steps.waiting() == {batch_id}
    assert scene.steps.busy([batch_id]) == set()


async def test_a_step_that_fails_is_tried_later_and_later(scene: Scene) -> None:
    """The queue is away: nothing waits on RQ's queue meanwhile, and the pause grows to its limit."""
    batch_id = scene.submit([line(1)])
    await scene.step(batch_id)
    scene.context.broker = None
    pauses = []
    for _ in range(12):
        await scene.step(batch_id)
        pauses.append(scene.steps.connection.pttl(f"rq:inferq:pause:{batch_id}"))
    assert scene.batcher.fault.startswith("the queue cannot be reached")
    assert pauses[0] <= 10 < pauses[3] <= 80 < pauses[-1] <= scene.settings.max_retry_backoff_ms
    assert scene.steps.waiting() == set()
    scene.context.broker = scene.broker
    batch = await scene.end(batch_id)
    assert batch.progress.completed == 1


async def test_a_step_that_breaks_does_not_do_so_for_ever(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of ours shows in RQ's failed jobs, is tried again, and fails the batch in the end."""
    monkeypatch.setattr("batches.step_runner.MAX_FAILURES", 3)
    batch_id = scene.submit([line(1)])
    scene.shelf.store.put(f"t-{ACME}/batches/{batch_id}/run/checkpoint", b"not ours")
    for _ in range(3):
        with pytest.raises(ValueError, match="Checkpoint"):
            await scene.batcher.advance(ACME, batch_id)
        scene.steps.forget([batch_id], "pause")
    batch = await scene.step(batch_id)
    assert [error.code for error in batch.progress.errors] == ["internal_error"]
    assert scene.shelf.batches.live() == []


async def test_no_other_code_is_run_whatever_stands_in_redis(scene: Scene) -> None:
    """Whoever may write to RQ's Redis does not choose what runs here: not as a job, nor as a callback of one."""
    scene.steps.queue.enqueue_call(func="os.system", args=("true",), job_id="evil")
    job = StepJob.fetch("evil", connection=scene.steps.connection, serializer=scene.steps.queue.serializer)
    with pytest.raises(PermissionError, match=r"runs batches\.rq_jobs\.advance only"):
        job.perform()
    scene.steps.connection.hset("rq:job:evil", "success_callback_name", "os.system")
    job.refresh()
    assert job.success_callback is job.failure_callback is job.stopped_callback is None


async def test_an_outage_of_rqs_redis_is_an_error_of_ours(scene: Scene) -> None:
    """It says what is away."""
    scene.server.connected = False
    with pytest.raises(BrokerUnavailable, match="RQ's Redis"):
        scene.sweep.once()


def test_a_redis_user_without_the_rights_gets_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Manager names the worker's user, which may not touch RQ's keys."""
    connection = fakeredis.FakeRedis()

    def refuse(*_: object) -> None:
        raise redis.exceptions.NoPermissionError("this user has no permissions to run the 'exists' command")

    monkeypatch.setattr(connection, "exists", refuse)
    with pytest.raises(BrokerUnavailable, match=r"a Redis user of their own, see docs/topologies\.md"):
        StepQueue(connection).is_locked("batch_1")


async def test_a_damaged_record_keeps_nothing_from_other_batches(scene: Scene) -> None:
    """Neither the sweep nor a list ends at it; its mark goes like that of a batch that never came."""
    damaged, whole = scene.submit([line(1)]), scene.submit([line(1)])
    scene.shelf.store.put(BatchStore.name(ACME, damaged, "request"), b"\0\0")
    assert scene.sweep.once() == [whole]
    assert [batch.request.id for batch in scene.shelf.batches.page(ACME)[0]] == [whole]
    scene.now += 2 * ORPHAN_MS / 1000
    for _ in range(2):
        scene.sweep.once()
    assert scene.shelf.batches.live() == [(ACME, whole)]


async def test_progress_and_cancel_that_are_damaged_do_no_harm(scene: Scene) -> None:
    """Progress is written anew; that there is a cancel counts, not what it says."""
    one, other = scene.submit([line(1)]), scene.submit([line(1)])
    scene.shelf.store.put(BatchStore.name(ACME, one, "progress"), b"\0\0")
    scene.shelf.store.put(BatchStore.name(ACME, other, "cancel"), b"")
    assert (await scene.end(one)).progress.completed == 1
    assert (await scene.end(other)).progress.status is BatchStatus.CANCELLED


async def test_batches_that_wait_for_answers_rest(scene: Scene) -> None:
    """While others have a step on the queue, one that finds nothing to do comes back after a pause, not at once."""
    first, second = scene.submit([line(1)]), scene.submit([line(1)])
    await scene.until(first, lambda batch: batch.progress.status is BatchStatus.IN_PROGRESS)
    for _ in range(2):
        await scene.step(first)
    scene.steps.queue.empty()
    scene.steps.put(ACME, second, "next step", 1)
    await scene.batcher.advance(ACME, first)
    assert scene.steps.waiting() == {second}
    assert scene.steps.busy([first]) == {first}
    assert (await scene.end(first)).progress.completed == 1


async def test_a_batch_that_was_given_two_steps_has_one_soon(scene: Scene) -> None:
    """By the sweeps of two batchers at once: a step that finds another of its batch on the queue leaves it at that."""
    batch_id = scene.submit([line(1)])
    scene.steps.put(ACME, batch_id, "next step", 1)
    await scene.batcher.advance(ACME, batch_id)
    assert scene.steps.queue.get_job_ids() == [f"{batch_id}-1"]


def test_a_turn_comes_soon_however_many_batches_are_live() -> None:
    """Steps are shorter the more batches wait, down to a limit below which they would only begin and end."""
    settings = BatchSettings(step_ms=2_000, shared_step_ms=500)
    assert [step_limit_ms(settings, others) for others in (0, 1, 20, 100, 1_000)] == [2_000, 500, 500, 100, 50]
    assert step_limit_ms(BatchSettings(shared_step_ms=20), 1_000) == 20
