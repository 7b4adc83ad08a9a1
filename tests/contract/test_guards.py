"""Each guard is worth its place: with it a scenario holds, and with it taken out the same scenario fails.

A mutation replaces a text that must occur exactly once, so it cannot rot unnoticed.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import fakeredis
import pytest

import broker.calls
from broker import Broker
from broker.scripts import Script, load_scripts
from queue_schemas import Fenced, Job, Outcome, Settled, State, new_incarnation
from queue_schemas.keys import ShardKeys
from tests.support.queue import Puller, answer_frame, make_job

from .conftest import Listener

KEYS = ShardKeys(0)


@dataclass
class Scene:
    """An empty queue in memory, one worker that has joined, one Router that listens."""

    broker: Broker
    worker: Puller
    listener: Listener
    client: Any

    async def another(self) -> Puller:
        """A worker that joins now."""
        return await Puller(self.broker).join()

    def job(self, **fields: Any) -> Job:
        """A job for whose answer the Router waits."""
        return make_job(reply_to=self.listener.router, **fields)


async def the_epoch_fences(scene: Scene) -> None:
    """An attempt whose job runs again elsewhere cannot settle it."""
    await scene.broker.enqueue(scene.job())
    lease = await scene.worker.claim_one()
    await scene.broker.reclaim(scene.worker.incarnation)
    again = await (await scene.another()).claim_one()
    late = replace(lease, attempt_id=again.attempt_id)
    assert await scene.broker.settle(late, Outcome.DONE, answer_frame(late)) is Settled.FENCED


async def the_attempt_id_fences(scene: Scene) -> None:
    """The right epoch is not enough: it may be guessed, or be that of a job put on the queue anew."""
    await scene.broker.enqueue(scene.job())
    lease = replace(await scene.worker.claim_one(), attempt_id="somebody")
    assert await scene.broker.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.FENCED


async def nobody_makes_a_reply_stream(scene: Scene) -> None:
    """A Router that is gone stays gone: nothing is written for it that nobody would ever read or trim."""
    await scene.broker.enqueue(scene.job())
    lease = await scene.worker.claim_one()
    await scene.listener.leave()
    await scene.broker.settle(lease, Outcome.DONE, answer_frame(lease))
    assert not await scene.client.exists(KEYS.reply(scene.listener.router))


async def a_tombstone_stands(scene: Scene) -> None:
    """A late copy of an enqueue does not run a job again that has ended."""
    job = scene.job()
    await scene.broker.enqueue(job)
    lease = await scene.worker.claim_one()
    await scene.broker.settle(lease, Outcome.DONE, answer_frame(lease))
    assert await scene.broker.enqueue(job) is State.DONE
    assert await scene.worker.claim() == []


async def a_cancel_that_comes_first_stands(scene: Scene) -> None:
    """A client that was faster than its own request is not served."""
    job = scene.job()
    await scene.broker.cancel(job.id, "the client left")
    assert await scene.broker.enqueue(job) is State.CANCELLED
    assert await scene.worker.claim() == []


async def a_repeated_claim_gives_the_same(scene: Scene) -> None:
    """Its reply was lost: the jobs must not be leased to nobody, nor more of them given."""
    for _ in range(2):
        await scene.broker.enqueue(scene.job())
    lease = await scene.worker.claim_one()
    scene.worker.seq -= 1
    assert (await scene.worker.claim_one()).attempt_id == lease.attempt_id


async def a_late_claim_gives_nothing(scene: Scene) -> None:
    """A copy of an older claim, from a connection that was given up: its jobs would be leased to nobody."""
    assert await scene.worker.claim() == []
    assert await scene.worker.claim() == []
    await scene.broker.enqueue(scene.job())
    scene.worker.seq -= 2
    assert await scene.worker.claim() == []


async def the_dead_do_not_renew(scene: Scene) -> None:
    """Who was declared dead learns it, and does not hold the leases of its next job."""
    await scene.broker.enqueue(scene.job())
    await scene.worker.claim_one()
    await scene.broker.reclaim(scene.worker.incarnation)
    with pytest.raises(Fenced):
        await scene.broker.renew(scene.worker.incarnation)


async def the_dead_claim_nothing(scene: Scene) -> None:
    """Nobody would ever take its jobs back."""
    await scene.broker.reclaim(scene.worker.incarnation)
    await scene.broker.enqueue(scene.job())
    with pytest.raises(Fenced):
        await scene.worker.claim()


async def nothing_starts_late(scene: Scene) -> None:
    """A job whose time ran out in the queue is not started."""
    await scene.broker.enqueue(scene.job(ttl_ms=20))
    await asyncio.sleep(0.03)
    assert await scene.worker.claim() == []


async def attempts_end(scene: Scene) -> None:
    """A job is started so often and no more."""
    await scene.broker.enqueue(scene.job(max_attempts=1))
    await scene.worker.claim_one()
    assert (await scene.broker.reclaim(scene.worker.incarnation)).dead == 1


async def a_lost_stream_waits(scene: Scene) -> None:
    """Run at once, it would repeat what was delivered."""
    await scene.broker.enqueue(scene.job(stream=True, on_loss="continue"))
    await scene.worker.claim_one()
    await scene.broker.reclaim(scene.worker.incarnation)
    assert await (await scene.another()).claim() == []


async def an_old_resume_is_void(scene: Scene) -> None:
    """Said of an earlier loss, it would repeat what was delivered since."""
    job = scene.job(stream=True, on_loss="continue")
    await scene.broker.enqueue(job)
    for epoch in (2, 3):
        worker = await scene.another()
        await worker.claim_one()
        await scene.broker.reclaim(worker.incarnation)
        if epoch == 2:
            await scene.broker.resume(job, 2)
    assert await scene.broker.resume(job, 2) is State.LOST


async def a_worker_holds_one_suspect(scene: Scene) -> None:
    """Two at once, and a crash would not tell which of them did it."""
    for _ in range(2):
        await scene.broker.enqueue(scene.job())
    await scene.broker.crashed(await scene.worker.claim(2), "it crashed")
    assert len(await (await scene.another()).claim(2)) == 1


async def a_repeated_release_is_known(scene: Scene) -> None:
    """A job that was handed back, and the reply lost, is not handed back once more by whoever has it now."""
    await scene.broker.enqueue(scene.job())
    lease = await scene.worker.claim_one()
    await scene.broker.release(lease, "draining", counted=False)
    assert await scene.broker.release(lease, "draining", counted=False) is Settled.DUPLICATE


async def the_budget_holds(scene: Scene) -> None:
    """What ends gives its room back, once."""
    await scene.broker.enqueue(scene.job())
    lease = await scene.worker.claim_one()
    await scene.broker.settle(lease, Outcome.DONE, answer_frame(lease))
    assert not await scene.client.exists(KEYS.budget)


async def what_does_not_run_is_handed_back(scene: Scene) -> None:
    """Redis lost that an attempt ended: its worker says so, and the job waits again."""
    await scene.broker.enqueue(scene.job())
    await scene.worker.claim_one()
    await scene.broker.hold(0, scene.worker.incarnation, scene.worker.seq, ())
    await (await scene.another()).claim_one()


async def a_late_comparison_takes_nothing(scene: Scene) -> None:
    """What was claimed since a worker compared is not in what it said."""
    await scene.broker.enqueue(scene.job())
    seq = scene.worker.seq
    lease = await scene.worker.claim_one()
    await scene.broker.hold(0, scene.worker.incarnation, seq, ())
    assert await scene.broker.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.OK


async def no_epoch_of_a_lost_attempt_comes_again(scene: Scene) -> None:
    """Redis lost epoch 2 and who had it: what is handed back begins far above."""
    await scene.broker.enqueue(scene.job())
    await scene.worker.claim_one()
    await scene.broker.hold(0, scene.worker.incarnation, scene.worker.seq, ())
    assert (await scene.worker.claim_one()).epoch > 2


async def what_waits_is_raised(scene: Scene) -> None:
    """Redis lost that a job ran: its next attempt is not of the epoch that the Router has heard frames of."""
    job = scene.job()
    await scene.broker.enqueue(job)
    await scene.broker.raise_epoch(job.id, 1)
    assert (await scene.worker.claim_one()).epoch > 1


Scenario = Callable[[Scene], Awaitable[None]]
SAME = "local same = job.epoch == epoch and job.aid == aid"
RELEASED = "if releasing and job.ended == epoch .. ':' .. aid then return nil, 'duplicate' end"
GUARDS: list[tuple[Scenario, str, str, str]] = [
    (the_epoch_fences, "_shared", SAME, "local same = job.aid == aid"),
    (the_attempt_id_fences, "_shared", SAME, "local same = job.epoch == epoch"),
    (nobody_makes_a_reply_stream, "settle", "'NOMKSTREAM', '*', 'f'", "'*', 'f'"),
    (a_tombstone_stands, "_shared", "call('PEXPIRE', key, TOMBSTONE_MS)", "call('DEL', key)"),
    (a_cancel_that_comes_first_stands, "cancel", "call('PEXPIRE', key, TOMBSTONE_MS)", "call('DEL', key)"),
    (a_repeated_claim_gives_the_same, "claim", "if last[1] == seq then", "if false then"),
    (a_late_claim_gives_nothing, "claim", "tonumber(seq) < tonumber(last[1])", "false"),
    (the_dead_do_not_renew, "renew", "if is_fenced(incarnation) then return -1 end", ""),
    (the_dead_claim_nothing, "claim", "if is_fenced(incarnation) then return { 'fenced' } end", ""),
    (nothing_starts_late, "claim", "if tonumber(job.deadline) <= now then", "if false then"),
    (attempts_end, "_shared", "if attempts >= tonumber(job.max) then", "if false then"),
    (a_lost_stream_waits, "_shared", "job.resume == '1' and 'lost' or 'requeued'", "'requeued'"),
    (an_old_resume_is_void, "resume", "job.state ~= 'lost' or job.epoch ~= ARGV[3]", "job.state ~= 'lost'"),
    (a_worker_holds_one_suspect, "claim", "not held_suspect and take_from_stream", "take_from_stream"),
    (a_repeated_release_is_known, "_shared", RELEASED, ""),
    (what_does_not_run_is_handed_back, "hold", "job.state == 'leased' and job.owner == incarnation", "false"),
    (a_late_comparison_takes_nothing, "hold", "if claimed > tonumber(ARGV[3]) then return answer end", ""),
    (no_epoch_of_a_lost_attempt_comes_again, "hold", "RUN_EPOCHS) + 1) * RUN_EPOCHS - 1", "1))"),
    (what_waits_is_raised, "raise_epoch", "if job.state == 'queued' and epoch < above then", "if false then"),
    (the_budget_holds, "_shared", "add('budget', 't:' .. job.tenant .. ':jobs', -1)", ""),
]  # fmt: skip


def mutated(part: str, text: str, replacement: str) -> Callable[..., dict[str, Script]]:
    """The scripts, with ``text`` of ``part`` (a script, or what all share) replaced."""
    shared = load_scripts(flags=False)["join"].source.partition("-- An incarnation of a worker enters")[0]

    def load(*, flags: bool) -> dict[str, Script]:
        scripts = load_scripts(flags=flags)
        changed = {}
        for name, script in scripts.items():
            before = shared if part == "_shared" else script.source.removeprefix(shared)
            if name == "act_as_manager" or part not in ("_shared", name):
                continue
            assert before.count(text) == 1, f"{part} has {before.count(text)} times {text!r}: adapt the mutation"
            source = script.source.replace(text, replacement)
            sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
            changed[name] = Script(name, source, sha)
        return scripts | changed

    return load


async def play(scenario: Scenario) -> None:
    """A scenario on an empty queue of its own."""
    server = fakeredis.FakeServer()
    queue = Broker.over(fakeredis.FakeAsyncRedis(server=server, protocol=2), retry_limit_ms=1_000)
    client = fakeredis.FakeAsyncRedis(server=server, protocol=2)
    try:
        worker = await Puller(queue, new_incarnation("worker")).join()
        await scenario(Scene(queue, worker, await Listener(client).open(), client))
    finally:
        await queue.close()
        await client.aclose()


@pytest.mark.parametrize(("scenario", "part", "text", "replacement"), GUARDS, ids=[g[0].__name__ for g in GUARDS])
async def test_a_guard_is_needed(
    scenario: Scenario, part: str, text: str, replacement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scenario holds with the guard, and fails without it."""
    await play(scenario)
    monkeypatch.setattr(broker.calls, "load_scripts", mutated(part, text, replacement))
    with pytest.raises((AssertionError, pytest.fail.Exception, ValueError)):
        await play(scenario)
