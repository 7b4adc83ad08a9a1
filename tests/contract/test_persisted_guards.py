"""The guards of persisted jobs: with each a scenario holds, and with it taken out the same scenario fails."""

from __future__ import annotations

from typing import Any

import pytest

from broker.redis.scripts import load_scripts
from queue_schemas import HEAD, Frame, IdempotencyKeyReused, Job, Lease
from queue_schemas.keys import ShardKeys
from tests.contract.rewriting import Rewrite, rewritten
from tests.contract.test_guards import Scenario, Scene, play
from tests.support.queue import make_job

KEYS = ShardKeys(0)


def keyed(**fields: Any) -> Job:
    """A persisted stream under one key."""
    return make_job(persisted=True, idempotency_key="order-17", stream=True, **fields)


def piece(lease: Lease, seq: int) -> bytes:
    """A packed frame of a stream that goes on."""
    head = (200, "text/event-stream") if seq == 0 else (0, "")
    return Frame(lease.job.id, lease.epoch, lease.attempt_id, seq, HEAD if seq == 0 else 0, b"x", *head).pack()


async def kept(scene: Scene, job: Job) -> list[tuple[int, int]]:
    """Which frames are kept of a job."""
    page = await scene.broker.output.read(job.id)
    return [(frame.epoch, frame.seq) for frame in page.frames] if page else []


async def one_key_is_one_job(scene: Scene) -> None:
    """However many ask for it."""
    first = keyed()
    await scene.broker.jobs.enqueue_persisted(first, listener=scene.listener.router)
    assert (await scene.broker.jobs.enqueue_persisted(keyed(), listener=scene.listener.router)).job_id == first.id


async def a_key_is_of_one_request(scene: Scene) -> None:
    """Nobody is given the answer to another question."""
    await scene.broker.jobs.enqueue_persisted(keyed(), listener=scene.listener.router)
    try:
        await scene.broker.jobs.enqueue_persisted(keyed(body=b"{}"), listener=scene.listener.router)
    except IdempotencyKeyReused:
        return
    pytest.fail("another request was taken for the same")


async def a_job_without_an_answer_frees_its_key(scene: Scene) -> None:
    """A retry runs, instead of being told for a day that there is no answer."""
    job, again = keyed(), keyed()
    await scene.broker.jobs.enqueue_persisted(job, listener=scene.listener.router)
    await scene.broker.jobs.cancel(job.id, "its tenant wanted that")
    assert (await scene.broker.jobs.enqueue_persisted(again, listener=scene.listener.router)).job_id == again.id


async def no_answer_is_kept_with_a_hole(scene: Scene) -> None:
    """The server lost frames that their worker has not any more."""
    job = keyed()
    await scene.broker.jobs.enqueue_persisted(job, listener=scene.listener.router)
    lease = await scene.worker.claim_one()
    await scene.broker.attempts.append(lease, piece(lease, 0))
    await scene.broker.attempts.append(lease, piece(lease, 2))
    assert await kept(scene, job) == [(1, 0)]


async def what_is_kept_is_one_answer(scene: Scene) -> None:
    """An attempt that begins anew leaves nothing of an earlier one to be read in front of it."""
    job = keyed()
    await scene.broker.jobs.enqueue_persisted(job, listener=scene.listener.router)
    lease = await scene.worker.claim_one()
    await scene.broker.attempts.append(lease, piece(lease, 0))
    await scene.broker.attempts.release(lease, "draining", counted=False)
    again = await (await scene.another()).claim_one()
    await scene.broker.attempts.append(again, piece(again, 0))
    assert await kept(scene, job) == [(2, 0)]


async def nobody_makes_a_listeners_stream(scene: Scene) -> None:
    """A Router that followed a persisted job and is gone stays gone."""
    await scene.broker.jobs.enqueue_persisted(keyed(), listener=scene.listener.router)
    lease = await scene.worker.claim_one()
    await scene.listener.leave()
    await scene.broker.attempts.append(lease, piece(lease, 0))
    assert not await scene.client.exists(KEYS.reply(scene.listener.router))


async def kept_bytes_are_given_back(scene: Scene) -> None:
    """What is forgotten counts no more."""
    job = keyed()
    await scene.broker.jobs.enqueue_persisted(job, listener=scene.listener.router)
    await scene.broker.jobs.cancel(job.id, "its tenant wanted that")
    assert not await scene.client.exists(KEYS.budget)


async def a_stray_beginning_cancels_no_stored_job(scene: Scene) -> None:
    """A Router that is sent something of a job which nobody follows there speaks for itself only."""
    job = keyed()
    await scene.broker.jobs.enqueue_persisted(job, listener=scene.listener.router)
    await scene.broker.jobs.cancel(job.id, "nobody waits", if_orphaned=True)
    assert len(await scene.worker.claim()) == 1


FREED = "if holder and string.sub(holder, 1, string.len(id) + 1) == id .. ' ' then call('DEL', key) end"
GUARDS: list[tuple[Scenario, Rewrite]] = [
    (one_key_is_one_job, Rewrite("enqueue", "idem ~= '' and holder(idem, request)", "false")),
    (a_key_is_of_one_request, Rewrite("enqueue", "theirs == request", "true")),
    (a_job_without_an_answer_frees_its_key, Rewrite("persisted", FREED, "")),
    (no_answer_is_kept_with_a_hole, Rewrite("settle", "if due and seq > due then", "if false then")),
    (what_is_kept_is_one_answer, Rewrite("settle", "if restarts_output and due == 0", "if false")),
    (nobody_makes_a_listeners_stream, Rewrite("listeners", "'NOMKSTREAM', '*', field", "'*', field")),
    (kept_bytes_are_given_back, Rewrite("persisted", "-tonumber(bytes or 0)", "0")),
    (a_stray_beginning_cancels_no_stored_job, Rewrite("cancel", "condition == '1' and job.persisted == '1'", "false")),
]  # fmt: skip


@pytest.mark.parametrize(("scenario", "without"), GUARDS, ids=[scenario.__name__ for scenario, _ in GUARDS])
async def test_a_guard_is_needed(scenario: Scenario, without: Rewrite) -> None:
    """The scenario holds with the guard, and fails without it."""
    rewritten(load_scripts(flags=False), without)  # its text is there
    await play(scenario)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        await play(scenario, without)
