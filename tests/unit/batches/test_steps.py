"""Batches step by step: what each ending leaves, and that nothing is lost or doubled on the way."""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from batches.core import job_of, reply_stream_of
from broker import ReplyMessage
from queue_schemas import JobId, Outcome, SessionId, StoreFull, Tenant
from queue_schemas.keys import ShardKeys
from storage import Batch, BatchStatus, writing
from tests.support.batches import jsonl, line
from tests.support.queue import Puller

from .scene import ACME, Scene, opened


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with opened(tmp_path, window_lines=8, chunk_lines=5, min_part_bytes=2_000) as scene:
        yield scene


def lines(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [line(number, **fields) for number in range(count)]


def names(count: int) -> set[str]:
    return {f"line-{number}" for number in range(count)}


async def test_a_batch_goes_from_its_record_to_its_files(scene: Scene) -> None:
    """Every line is answered by its own answer; counts, usage, stamps and the file's record are those of the whole."""
    batch_id = scene.submit(lines(50))
    batch = await scene.end(batch_id)
    progress = batch.progress
    assert (progress.status, progress.total, progress.completed, progress.failed) == ("completed", 50, 50, 0)
    assert progress.model == "sim"
    assert progress.usage["input_tokens"] == 100
    assert progress.usage["total_tokens"] == 250
    assert set(progress.stamps) == {"in_progress_at", "finalizing_at", "completed_at"}
    output = scene.output(batch)
    assert set(output) == names(50)
    for custom_id, one in output.items():
        assert one["response"]["body"]["said"] == custom_id.replace("line-", "question ")
        assert one["response"]["status_code"] == 200
        assert one["error"] is None
        assert one["id"] == one["response"]["request_id"]
    assert progress.error_file_id is None
    record = scene.shelf.files.get(ACME, progress.output_file_id or "", scene.now)
    assert record is not None
    assert (record.purpose, record.filename) == ("batch_output", f"{batch_id}_output.jsonl")
    assert len(record.parts) > 1


async def test_nothing_is_left_but_the_record_and_the_end(scene: Scene) -> None:
    """Chunks, runs, plans, the mark and what stood in Redis are gone with the batch."""
    batch_id = scene.submit(lines(20))
    await scene.end(batch_id)
    assert scene.shelf.batches.live() == []
    assert scene.shelf.store.names(f"t-{ACME}/batches/{batch_id}") == ["end", "progress", "request"]
    reply_stream = ShardKeys(0).reply(reply_stream_of(batch_id))
    assert not await scene.client().exists(reply_stream)
    assert not [key for key in await scene.client().keys("*") if b"inferq" in key and b"queue" not in key]


async def test_an_engines_error_is_a_line_of_the_error_file(scene: Scene) -> None:
    """A status from 400 up goes to the error file with the engine's answer; the others to the output."""

    def engine(body: dict[str, Any]) -> tuple[int, Any]:
        number = int(body["messages"][0]["content"].split()[1])
        return (400, {"error": {"message": "no"}}) if number % 5 == 0 else (200, {"n": number})

    batch = await scene.end(scene.submit(lines(20)), engine=engine)
    assert (batch.progress.completed, batch.progress.failed) == (16, 4)
    errors = scene.errors(batch)
    assert set(errors) == {"line-0", "line-5", "line-10", "line-15"}
    assert errors["line-5"]["response"]["status_code"] == 400
    assert errors["line-5"]["response"]["body"] == {"error": {"message": "no"}}
    assert set(scene.output(batch)) == names(20) - set(errors)


async def test_an_engine_that_is_too_busy_costs_no_line(scene: Scene) -> None:
    """A line that is answered with 429 or 503 is sent again after ever longer pauses, and has the answer that it gets
    then; no sooner, however often the reply stream is read."""
    asked: Counter[str] = Counter()

    def engine(body: dict[str, Any]) -> tuple[int, Any]:
        text = body["messages"][0]["content"]
        asked[text] += 1
        return (503 if asked[text] == 1 else 429, {"error": "busy"}) if asked[text] < 3 else (200, {"said": text})

    batch_id = scene.submit(lines(6))
    await scene.until(batch_id, lambda batch: batch.progress.status is BatchStatus.IN_PROGRESS, engine=engine)
    for tries, pause_s in ((1, 0.9), (2, 1.9)):
        for _ in range(4):
            await scene.step(batch_id)
            await scene.run_jobs(engine)
        assert set(asked.values()) == {tries}
        scene.now += pause_s
        await scene.step(batch_id)
        assert await scene.run_jobs(engine) == 0
        scene.now += 0.2
    batch = await scene.end(batch_id, engine=engine)
    assert (batch.progress.completed, batch.progress.failed) == (6, 0)
    assert set(scene.output(batch)) == names(6)
    assert set(asked.values()) == {3}


async def test_an_engine_that_stays_too_busy_is_believed(tmp_path: Path) -> None:
    """After all its tries a line has that answer, in the error file."""
    async with opened(tmp_path, max_busy_tries=3, busy_backoff_ms=10) as scene:
        batch_id, asked = scene.submit(lines(2)), [0]

        def engine(_: dict[str, Any]) -> tuple[int, Any]:
            asked[0] += 1
            return 503, {"error": "busy"}

        def ended_later(batch: Batch) -> bool:
            scene.now += 5
            return batch.ended

        batch = await scene.until(batch_id, ended_later, engine=engine)
        assert {one["response"]["status_code"] for one in scene.errors(batch).values()} == {503}
        assert (batch.progress.failed, asked[0]) == (2, 6)


async def test_an_answer_that_is_no_json_does_not_break_the_file(scene: Scene) -> None:
    """Whatever an engine says, each line of the output is one JSON object."""
    answers = {0: b"plain\ntext", 1: b'{"a":\n1}', 2: b'{"n": NaN}', 3: b"\xff\xfe"}

    def engine(body: dict[str, Any]) -> tuple[int, Any]:
        return 200, answers[int(body["messages"][0]["content"].split()[1])]

    output = scene.output(await scene.end(scene.submit(lines(4)), engine=engine))
    bodies = [output[f"line-{number}"]["response"]["body"] for number in range(4)]
    assert bodies[:3] == ["plain\ntext", {"a": 1}, '{"n": NaN}']


async def test_a_line_that_used_up_its_attempts_is_an_error(scene: Scene) -> None:
    """A dead letter has no answer: the error says what became of it."""
    batch_id = scene.submit(lines(3))
    await scene.until(batch_id, lambda batch: batch.progress.status is BatchStatus.IN_PROGRESS)
    await scene.step(batch_id)
    for _ in range(scene.settings.max_attempts):
        worker = await Puller(scene.broker).join()  # the one that failed is spared the same job for a while
        for lease in await worker.claim(8, models=["sim"]):
            await scene.broker.attempts.release(lease, "the engine broke", counted=True)
    batch = await scene.end(batch_id)
    errors = scene.errors(batch)
    assert set(errors) == names(3)
    assert errors["line-1"]["response"] is None
    assert errors["line-1"]["error"]["code"] == "attempts_exhausted"
    assert batch.progress.output_file_id is None


async def test_the_window_bounds_what_is_on_the_queue(scene: Scene) -> None:
    """However long the file, no more than the window's lines are on the queue at once."""
    batch_id = scene.submit(lines(100))
    await scene.until(batch_id, lambda batch: batch.progress.status is BatchStatus.IN_PROGRESS)
    for _ in range(3):
        await scene.step(batch_id)
        ((_, lanes),) = (await scene.broker.stats.depths()).items()
        assert lanes["batch"].waiting == 8  # type: ignore[index]
    await scene.run_jobs(most=3)
    await scene.step(batch_id)
    ((_, lanes),) = (await scene.broker.stats.depths()).items()
    assert lanes["batch"].waiting == 8  # type: ignore[index]


async def test_a_cancelled_batch_keeps_what_was_done(scene: Scene) -> None:
    """Cancel: no more lines, those on the queue are taken off it, finished ones are in the output."""
    batch_id = scene.submit(lines(60))
    await scene.until(batch_id, lambda batch: batch.progress.completed >= 20)
    scene.shelf.batches.ask_to_cancel(ACME, batch_id, int(scene.now))
    batch = await scene.until(batch_id, lambda batch: batch.ended)
    assert batch.progress.status is BatchStatus.CANCELLED
    assert {"cancelling_at", "cancelled_at", "finalizing_at"} <= set(batch.progress.stamps)
    output = scene.output(batch)
    assert 20 <= len(output) == batch.progress.completed < 60
    assert batch.progress.total == 60
    assert batch.progress.error_file_id is None
    assert await scene.broker.stats.depths() == {}


async def test_a_batch_that_is_cancelled_before_it_began_has_no_files(scene: Scene) -> None:
    """Nothing of it was run."""
    batch_id = scene.submit(lines(5))
    scene.shelf.batches.ask_to_cancel(ACME, batch_id, int(scene.now))
    batch = await scene.step(batch_id)
    assert batch.progress.status is BatchStatus.CANCELLED
    assert batch.progress.output_file_id is batch.progress.error_file_id is None


async def test_an_expired_batch_lists_what_was_not_done(scene: Scene) -> None:
    """At the end of its window: done lines in the output, every other one in the error file as batch_expired."""
    batch_id = scene.submit(lines(60), window_s=3_600)
    done = await scene.until(batch_id, lambda batch: batch.progress.completed >= 20)
    scene.now += 3_600
    batch = await scene.end(batch_id)
    assert batch.progress.status is BatchStatus.EXPIRED
    output, errors = scene.output(batch), scene.errors(batch)
    assert len(output) >= done.progress.completed
    assert set(output) | set(errors) == names(60)
    assert not set(output) & set(errors)
    assert {one["error"]["code"] for one in errors.values()} == {"batch_expired"}
    assert (batch.progress.completed, batch.progress.failed) == (len(output), len(errors))


async def test_a_batch_whose_input_is_deleted_fails_and_keeps_what_was_done(scene: Scene) -> None:
    """The file goes while it runs: failed, with its own code, and the finished lines in the output."""
    batch_id = scene.submit(lines(60))
    batch = await scene.until(batch_id, lambda batch: batch.progress.completed >= 20)
    record = scene.shelf.files.get(ACME, batch.request.input_file_id, scene.now)
    assert record is not None
    scene.shelf.files.delete(record)
    batch = await scene.end(batch_id)
    assert batch.progress.status is BatchStatus.FAILED
    assert [error.code for error in batch.progress.errors] == ["input_file_deleted"]
    assert len(scene.output(batch)) == batch.progress.completed >= 20
    assert batch.progress.stamps["failed_at"] == int(scene.now)


async def test_a_full_disk_loses_nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the store has no room, steps fail and are tried again, answers stay in the reply stream, and no line is
    sent
    beyond two windows; with room again the batch ends whole."""
    batch_id = scene.submit(lines(60))
    await scene.until(batch_id, lambda batch: batch.progress.completed >= 10)
    full = True

    def fsync(_: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, "no space")

    answered: Counter[str] = Counter()

    def engine(body: dict[str, Any]) -> tuple[int, Any]:
        answered[body["messages"][0]["content"]] += 1
        return 200, {}

    monkeypatch.setattr(writing.os, "fsync", fsync)
    ran = await scene.run_jobs(engine)
    for _ in range(6):
        await scene.step(batch_id)
        assert "no room" in scene.batcher.fault
        ran += await scene.run_jobs(engine)
    assert ran <= 3 * scene.settings.window_lines
    full = False
    batch = await scene.end(batch_id, engine=engine)
    assert scene.batcher.fault == ""
    assert set(scene.output(batch)) == names(60)
    assert set(answered.values()) == {1}, "an answer was let go of before it was stored"


async def test_a_step_that_is_never_saved_is_repeated_without_harm(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batcher that dies before it has saved its work: the next one finds the chunks, and no line runs twice."""
    answered: Counter[str] = Counter()

    def engine(body: dict[str, Any]) -> tuple[int, Any]:
        answered[body["messages"][0]["content"]] += 1
        return 200, {}

    def die(*_: object) -> None:
        raise StoreFull("as ordered")

    batch_id = scene.submit(lines(60))
    await scene.until(batch_id, lambda batch: batch.progress.completed >= 10, engine=engine)
    for _ in range(3):
        with monkeypatch.context() as broken:
            broken.setattr("batches.steps.run_folder.RunFolder.save", die)
            await scene.step(batch_id)
        await scene.run_jobs(engine)
    batch = await scene.end(batch_id, engine=engine)
    assert set(scene.output(batch)) == names(60)
    assert set(answered.values()) == {1}
    assert batch.progress.completed == 60


async def test_two_batchers_at_once_write_each_line_once(scene: Scene) -> None:
    """Without the lock, steps of two processes over the same work: what they store twice is written out once."""
    other, _, steps = scene.another()
    batch_id = scene.submit(lines(60))
    for _ in range(100):
        await scene.step(batch_id)
        if scene.shelf.batch(batch_id).ended:
            break
        stale = scene.shelf.store.get(f"t-{ACME}/batches/{batch_id}/run/work")
        await scene.run_jobs(most=5)
        await scene.step(batch_id)
        if stale is not None and not scene.shelf.batch(batch_id).ended:
            # The other one had begun before, and comes late with all that it does.
            scene.shelf.store.put(f"t-{ACME}/batches/{batch_id}/run/work", stale)
            steps.forget([batch_id], "pause", "lock")
            await other.advance(ACME, batch_id)
        await scene.run_jobs()
    batch = scene.shelf.batch(batch_id)
    assert batch.progress.status is BatchStatus.COMPLETED
    assert set(scene.output(batch)) == names(60)
    assert batch.progress.completed == 60


async def test_a_late_batcher_does_not_undo_an_end(scene: Scene) -> None:
    """What has ended stays so, whatever is written to its progress afterwards."""
    batch_id = scene.submit(lines(5))
    before = await scene.until(batch_id, lambda batch: batch.progress.status is BatchStatus.IN_PROGRESS)
    await scene.end(batch_id)
    scene.shelf.batches.set_progress(ACME, batch_id, before.progress)
    assert scene.shelf.batch(batch_id).progress.status is BatchStatus.COMPLETED


async def test_answers_that_were_lost_are_asked_for_again(scene: Scene) -> None:
    """Redis is emptied: lines that were on the queue, or answered and not stored, run again under their own ids."""
    batch_id = scene.submit(lines(30))
    await scene.until(batch_id, lambda batch: batch.progress.completed >= 5)
    await scene.run_jobs(most=3)
    await scene.client().flushall()
    await scene.serve()
    batch = await scene.end(batch_id)
    assert set(scene.output(batch)) == names(30)


async def test_a_job_that_ended_unheard_runs_again_as_another(scene: Scene) -> None:
    """Its answer never came to the reply stream, and the queue says that it is over: silence alone would last for
    ever."""
    batch_id = scene.submit(lines(3))
    await scene.until(batch_id, lambda batch: batch.progress.status is BatchStatus.IN_PROGRESS)
    await scene.step(batch_id)
    for lease in await scene.worker.claim(8, models=["sim"]):
        await scene.broker.attempts.settle(lease, Outcome.DONE, b"")
    scene.now += 3_600
    batch = await scene.end(batch_id)
    assert set(scene.output(batch)) == names(3)


async def test_jobs_are_cancelled_while_there_is_no_reply_stream_and_sent_again(scene: Scene) -> None:
    """A batcher that was away for longer than its reply stream lives: nothing ran for nobody, and nothing is lost."""
    batch_id = scene.submit(lines(3))
    await scene.until(batch_id, lambda batch: batch.progress.status is BatchStatus.IN_PROGRESS)
    await scene.step(batch_id)
    await scene.client().delete(ShardKeys(0).reply(reply_stream_of(batch_id)))
    assert await scene.run_jobs() == 0
    batch = await scene.end(batch_id)
    assert set(scene.output(batch)) == names(3)


async def test_large_answers_are_not_all_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is taken from the reply stream at a time is bounded by its size, whatever the engines say."""
    async with opened(tmp_path, window_lines=8, chunk_lines=5, step_ms=150) as scene:
        asked: list[int] = []
        read = scene.broker.durable_replies.read

        async def noted(shard: int, name: SessionId, after: str, block_ms: int, count: int) -> list[ReplyMessage]:
            asked.append(count)
            return await read(shard, name, after, block_ms, count)

        monkeypatch.setattr(scene.broker.durable_replies, "read", noted)
        monkeypatch.setattr("batches.steps.dispatcher._FIRST_MESSAGES", 3)
        monkeypatch.setattr("batches.steps.dispatcher._READ_BYTES", 1 << 20)
        batch = await scene.end(scene.submit(lines(24)), engine=lambda _: (200, {"text": "x" * 400_000}))
        assert set(scene.output(batch)) == names(24)
        assert 2 in asked
        assert max(asked) <= 6


async def test_large_answers_do_not_fill_redis(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many lines are on the queue at once is bounded by the size of their answers, before it is known by a few."""
    monkeypatch.setattr("batches.steps.open_lines._FIRST_LINES", 8)
    monkeypatch.setattr("batches.steps.open_lines._ANSWER_BYTES", 1_000_000)
    batch_id = scene.submit(lines(40))
    most = []
    while not (await scene.step(batch_id)).ended:
        most.append(await scene.run_jobs(lambda _: (200, {"text": "x" * 240_000})))
    assert max(most) == 8
    assert max(most[most.index(8) + 1 :]) == 4
    assert set(scene.output(scene.shelf.batch(batch_id))) == names(40)


async def test_a_tenant_over_its_budget_waits(tmp_path: Path) -> None:
    """The queue has no room: nothing is lost, and what fits goes on."""
    from broker import Broker, Budgets  # noqa: PLC0415

    async with opened(tmp_path, window_lines=8) as scene:
        scene.context.broker = Broker.over(scene.client(), budgets=Budgets(tenant_jobs=3), retry_limit_ms=200)
        batch = await scene.end(scene.submit(lines(20)))
        assert set(scene.output(batch)) == names(20)
        await scene.context.broker.close()


async def test_an_output_expires_when_it_was_asked_to(scene: Scene) -> None:
    """``output_expires_after`` counts from the file's creation."""
    batch_id = scene.submit(lines(3), output_expires_after={"anchor": "created_at", "seconds": 7_200})
    batch = await scene.end(batch_id)
    record = scene.shelf.files.get(ACME, batch.progress.output_file_id or "", scene.now)
    assert record is not None
    assert record.expires_at == record.created_at + 7_200


async def test_batches_of_two_tenants_have_their_own_files(scene: Scene) -> None:
    """No answer of one tenant's lands with the other, though their lines have the same ids."""
    globex = Tenant("globex")
    ids = {ACME: scene.submit(lines(10)), globex: scene.submit(lines(10), globex)}
    for tenant, batch_id in ids.items():
        await scene.until(batch_id, lambda batch: batch.progress.status is BatchStatus.IN_PROGRESS, tenant)
    for tenant, batch_id in ids.items():
        batch = await scene.end(batch_id, tenant)
        assert set(scene.output(batch)) == names(10)
        assert all(other == tenant or scene.shelf.batches.get(other, batch_id) is None for other in ids)


async def test_a_line_keeps_its_job_whoever_sends_it(scene: Scene) -> None:
    """Ids of jobs are made from batch and line, of this shape."""
    one = job_of("batch_x", 3, 7, 0)
    assert one == job_of("batch_x", 3, 7, 0)
    assert len({one, job_of("batch_x", 3, 7, 1), job_of("batch_x", 3, 8, 0), job_of("batch_y", 3, 7, 0)}) == 4
    assert JobId(one).startswith("3-")


async def test_the_body_reaches_the_engine_as_it_was_written(scene: Scene) -> None:
    """Everything in a line's body, and nothing else."""
    body = {
        "model": "sim",
        "messages": [{"role": "user", "content": "\u00e4\u2028\U0001f600"}],
        "x": [1.5, None, 10**12],
    }
    file_id = scene.shelf.upload(jsonl([line(0) | {"body": body, "more": "ignored"}]))
    batch_id = scene.shelf.submit(file_id, now_s=scene.now)
    seen: list[dict[str, Any]] = []

    def engine(given: dict[str, Any]) -> tuple[int, Any]:
        seen.append(given)
        return 200, {}

    await scene.end(batch_id, engine=engine)
    assert seen == [json.loads(json.dumps(body))]


async def test_a_young_batch_shows_that_it_moves(scene: Scene) -> None:
    """Results of slow lines are counted after seconds at first; after hours so many chunks would be a burden."""
    batch_id = scene.submit(lines(8))

    async def pause_until_counted(done: int) -> float:
        await scene.run_jobs(most=1)
        await scene.step(batch_id)
        began = scene.now
        while scene.shelf.batch(batch_id).progress.completed < done:
            scene.now += 3
            await scene.step(batch_id)
        return scene.now - began

    await scene.until(batch_id, lambda batch: batch.progress.status is BatchStatus.IN_PROGRESS)
    await scene.step(batch_id)
    assert await pause_until_counted(1) == 3
    scene.now += 3_600
    await scene.run_jobs(most=1)
    await scene.step(batch_id)
    assert await pause_until_counted(3) == 30
