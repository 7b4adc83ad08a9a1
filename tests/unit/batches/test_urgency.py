"""Batches whose deadlines are near: where their lines are, which of them move, and what batches tell each other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from batches.steps.run_folder import RunFolder
from queue_schemas import Lane, Pool
from scheduling.batch_urgency import BatchNeed
from tests.support.batches import line

from .scene import Scene, opened

WINDOW_S = 600
NEED = BatchNeed(deadline_s=2_000_000_500.0, remaining=7, rate=0.5, load=0.9)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with opened(tmp_path, window_lines=8, resend_after_ms=3_600_000) as scene:
        yield scene


async def waiting(scene: Scene) -> tuple[int, int]:
    """Lines in the background lane and in the batch lane."""
    lanes = (await scene.broker.stats.depths()).get(Pool("sim"), {})
    return tuple(lanes[lane].waiting if lane in lanes else 0 for lane in (Lane.BACKGROUND, Lane.BATCH))  # type: ignore[return-value]


async def dispatching(scene: Scene, lines: int = 30) -> str:
    """A batch with its window on the queue, and ten minutes for all lines."""
    batch_id = scene.submit((line(number) for number in range(lines)), window_s=WINDOW_S)
    for _ in range(20):
        await scene.step(batch_id)
        if await waiting(scene) == (0, 8):
            return batch_id
    raise AssertionError("no lines were sent")


async def let_time_pass(scene: Scene, batch_id: str, seconds: int, each: int = 10) -> None:
    """Steps every ``each`` seconds while nothing is answered."""
    for _ in range(0, seconds, each):
        scene.now += each
        await scene.step(batch_id)


async def test_lines_that_wait_move_when_their_batch_is_late(scene: Scene) -> None:
    """Every second one to the background lane; what runs is left alone, and each line is answered once."""
    batch_id = await dispatching(scene)
    leases = await scene.worker.claim(2, models=["sim"])
    await let_time_pass(scene, batch_id, WINDOW_S // 2)
    background, batch_lane = await waiting(scene)
    assert (background + batch_lane, background) == (6, 3)
    assert {lease.job.lane for lease in leases} == {Lane.BATCH}
    for lease in leases:
        await scene.answer(lease)
    batch = await scene.end(batch_id)
    assert (batch.progress.completed, batch.progress.failed) == (30, 0)
    assert sorted(scene.output(batch)) == sorted(f"line-{number}" for number in range(30))


async def test_a_batch_with_time_to_spare_stays_in_its_lane(scene: Scene) -> None:
    """While it is answered fast enough nothing moves."""
    batch_id = await dispatching(scene, lines=200)
    for _ in range(10):
        scene.now += 2
        await scene.run_jobs(most=8)
        await scene.step(batch_id)
        assert await waiting(scene) == (0, 8)


async def test_a_line_is_moved_a_bounded_number_of_times(scene: Scene) -> None:
    """Each job of a line is one of its tries: half of them are left for engines that are busy."""
    most = scene.settings.max_busy_tries // 2
    batch_id = await dispatching(scene)
    before = await generations(scene, batch_id)
    for _ in range(2 * most):
        # Behind two others with less time it may not be hurried, alone it is late.
        for other in ("one", "another"):
            scene.steps.tell_need("sim", other, BatchNeed(scene.now + 1, 1, 1.0, 0.9), scene.now)
        await let_time_pass(scene, batch_id, 15, each=15)
        for other in ("one", "another"):
            scene.steps.tell_need("sim", other, None, scene.now)
        await let_time_pass(scene, batch_id, 15, each=15)
    after = await generations(scene, batch_id)
    assert max(before) == 0
    assert 1 < max(after) <= most
    batch = await scene.end(batch_id)
    assert batch.progress.completed == 30


async def generations(scene: Scene, batch_id: str) -> list[int]:
    """How many jobs the lines on the queue had before the present ones."""
    checkpoint, _ = RunFolder(scene.context.store, scene.shelf.batch(batch_id)).load()
    return [open_line.generation for open_line in checkpoint.open.values()]


async def test_batches_tell_what_they_need_while_their_slack_is_short(scene: Scene) -> None:
    """And no longer when they have ended; each reads what the others told."""
    batch_id = await dispatching(scene)
    assert scene.steps.other_needs("sim", "another", scene.now) == []
    await let_time_pass(scene, batch_id, WINDOW_S // 2)
    (need,) = scene.steps.other_needs("sim", "another", scene.now)
    assert need.remaining == 30
    assert need.deadline_s == scene.shelf.batch(batch_id).request.expires_at
    assert need.load > 0.85
    assert scene.steps.other_needs("sim", batch_id, scene.now) == []
    assert scene.steps.other_needs("other", "another", scene.now) == []
    await scene.end(batch_id)
    assert scene.steps.other_needs("sim", "another", scene.now) == []


async def test_a_batch_behind_an_earlier_deadline_does_not_take_both_lanes(scene: Scene) -> None:
    """Earliest deadline first, whichever batcher runs them."""
    batch_id = await dispatching(scene)
    for _ in range(WINDOW_S // 20):
        scene.steps.tell_need("sim", "another", BatchNeed(scene.now + 100, 50, 1.0, 0.9), scene.now)
        await let_time_pass(scene, batch_id, 10)
        assert await waiting(scene) == (0, 8)


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", "[1,2,3,4,5]", "[1,2,3,4,5,null]", "[NaN,1,1,1,0,2e9]", "[1,-1,1,1,0,2e9]", "[" * 10_000]
)
async def test_needs_that_cannot_be_read_are_dropped(scene: Scene, text: str) -> None:
    """RQ's Redis may hold anything."""
    scene.steps.tell("needs", "sim", "broken", text, 60)
    scene.steps.tell_need("sim", "old", NEED, scene.now - 61)
    scene.steps.tell_need("sim", "another", NEED, scene.now)
    assert scene.steps.other_needs("sim", "mine", scene.now) == [NEED]
    assert set(scene.steps.told("needs", "sim")) == {"another"}
