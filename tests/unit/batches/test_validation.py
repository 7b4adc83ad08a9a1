"""What is wrong with an input file is told by line before any of it runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from queue_schemas import Assignment, WorkerInfo
from queue_schemas.fleet.adapters import adapter_set_of
from storage import Batch, BatchStatus
from tests.support.batches import ACME, jsonl, line

from .scene import Scene, opened


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with opened(tmp_path, max_lines=50, max_line_bytes=4_096, model_wait_ms=0) as scene:
        yield scene


async def refused(scene: Scene, data: bytes) -> Batch:
    """The batch over this file, which has failed without a line run."""
    batch_id = scene.shelf.submit(scene.shelf.upload([data]), now_s=scene.now)
    batch = await scene.until(batch_id, lambda batch: batch.ended)
    assert batch.progress.status is BatchStatus.FAILED
    assert batch.progress.stamps == {"failed_at": int(scene.now)}
    assert (batch.progress.total, batch.progress.output_file_id, batch.progress.error_file_id) == (0, None, None)
    assert await scene.broker.stats.depths() == {}
    assert scene.shelf.batches.live() == []
    return batch


def told(batch: Batch) -> list[tuple[str, int | None]]:
    return [(error.code, error.line) for error in batch.progress.errors]


def text(*lines: dict[str, Any] | bytes) -> bytes:
    return b"".join(one + b"\n" if isinstance(one, bytes) else next(jsonl([one])) for one in lines)


async def test_every_fault_is_reported_with_its_line(scene: Scene) -> None:
    """Several faults of several kinds, in one answer, the good lines between them."""
    data = text(line(1), b"no json", b"", line(2) | {"method": "GET"}, line(3) | {"url": "/x"}, line(4, model="other"))
    assert told(await refused(scene, data)) == [
        ("invalid_json_line", 2),
        ("invalid_method", 4),
        ("invalid_url", 5),
        ("mismatched_model", 6),
    ]


@pytest.mark.parametrize(
    ("data", "code", "number"),
    [
        (b"", "empty_file", None),
        (b"\n \r\n", "empty_file", None),
        (text(line(1)).decode().encode("utf-16"), "invalid_encoding", 1),
        (text(line(1), line(2), line(1)), "duplicate_custom_id", 3),
        (text(line(1) | {"x": "y" * 5_000}), "line_too_long", 1),
        (text(*(line(number) for number in range(51))), "too_many_lines", None),
        (text(line(1, model="never-heard-of")), "model_not_found", 1),
        (text(line(1))[:-30], "invalid_json_line", 1),
    ],
)
async def test_each_bad_file_has_its_code(scene: Scene, data: bytes, code: str, number: int | None) -> None:
    """Empty, of the wrong encoding, with ids twice, too long, too many, an unknown model, cut short."""
    batch = await refused(scene, data)
    assert told(batch) == [(code, number)]
    assert batch.progress.errors[0].message


async def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    """Its size alone says it."""
    async with opened(tmp_path) as scene:
        scene.context.max_input_bytes = 2_000
        assert told(await refused(scene, text(*(line(number) for number in range(20))))) == [("file_too_large", None)]


async def test_no_more_than_a_hundred_faults_are_reported(tmp_path: Path) -> None:
    """Reading ends there."""
    async with opened(tmp_path) as scene:
        batch = await refused(scene, b"x\n" * 1_000)
        assert told(batch) == [("invalid_json_line", number) for number in range(1, 101)]


async def test_repeats_are_found_across_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long file is read in many steps, each leaving a run; an id of the first stands in the last."""
    monkeypatch.setattr("batches.steps.validate.MAX_RECORDS", 64)
    monkeypatch.setattr("batches.steps.validate._SLICE_RECORDS", 100)
    async with opened(tmp_path) as scene:
        scene.context.tick_s = iter(range(0, 10**9, 7)).__next__  # each look at the clock finds the step's time over
        data = text(*(line(number) for number in range(500)), line(3), line(250))
        batch_id = scene.shelf.submit(scene.shelf.upload([data]), now_s=scene.now)
        steps = 0
        while not (batch := await scene.step(batch_id)).ended:
            steps += 1
        assert steps > 8
        assert sorted(told(batch)) == [("duplicate_custom_id", 501), ("duplicate_custom_id", 502)]
        assert "line 501 has the same custom_id as line 4" in " ".join(error.message for error in batch.progress.errors)


async def test_a_model_that_nobody_has_named_yet_is_waited_for(tmp_path: Path) -> None:
    """Redis was emptied, or the fleet starts: its workers register in a moment."""
    async with opened(tmp_path, model_wait_ms=5_000) as scene:
        batch_id = scene.submit([line(1, model="late")])
        for _ in range(5):
            batch = await scene.step(batch_id)
        assert batch.progress.status is BatchStatus.VALIDATING
        await scene.broker.known_pools.remember(["late"])
        batch = await scene.until(batch_id, lambda batch: batch.progress.status is not BatchStatus.VALIDATING)
        assert batch.progress.status is BatchStatus.IN_PROGRESS
        late = scene.submit([line(1, model="later")])
        await scene.step(late)
        await scene.step(late)
        scene.now += 6
        batch = await scene.until(late, lambda batch: batch.ended)
        assert told(batch) == [("model_not_found", 1)]


async def test_a_model_that_a_worker_could_load_is_one(tmp_path: Path) -> None:
    """As its engine's model, or as an adapter: nobody had to ask for it before."""
    async with opened(tmp_path) as scene:
        adapters = frozenset({"tuned"})
        info = WorkerInfo(
            worker_id="w1",
            session_id=scene.worker.session_id,
            loadable=["sim", "installed"],
            adapter_set=adapter_set_of(adapters),
            assignment=Assignment(term=1, version=1),
        )
        await scene.broker.fleet.save_adapter_sets({info.adapter_set: adapters}, [])
        await scene.broker.fleet.save_workers([info], [])
        for model in ("installed", "tuned"):
            batch_id = scene.submit([line(1, model=model)])
            batch = await scene.until(batch_id, lambda batch: batch.progress.status is not BatchStatus.VALIDATING)
            assert batch.progress.status is BatchStatus.IN_PROGRESS


async def test_an_input_that_is_gone_before_the_batch_began_fails_it(scene: Scene) -> None:
    """Deleted between create and validation."""
    batch_id = scene.submit([line(1)])
    record = scene.shelf.files.get(ACME, scene.shelf.batch(batch_id).request.input_file_id, scene.now)
    assert record is not None
    scene.shelf.files.delete(record)
    assert told(await scene.until(batch_id, lambda batch: batch.ended)) == [("input_file_deleted", None)]
