"""Each guard is worth its place: with it a scenario holds, and with it taken out the same scenario fails.

A mutation replaces a text that must occur exactly once, so it cannot rot unnoticed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import fakeredis
import pytest

from broker import Broker
from broker.redis.scripts import load_scripts
from queue_schemas import (
    ControlKind,
    Fenced,
    Job,
    Lane,
    Lease,
    MarkerKind,
    Outcome,
    Settled,
    State,
    WaitTooLong,
    new_session_id,
)
from queue_schemas.keys import ShardKeys, queue_key
from tests.support.queue import MODEL, Puller, answer_frame, make_job

from .conftest import Listener
from .rewriting import CLOCK_OF_TESTS, Rewrite, rewritten, set_clock

KEYS = ShardKeys(0)
START_MS = 1_600_000_000_000


@dataclass
class Scene:
    """An empty queue in memory, one worker that has joined, one Router that listens."""

    broker: Broker
    worker: Puller
    listener: Listener
    client: Any

    async def wait(self, ms: int) -> None:
        """Time passes on the queue's clock, from the start on."""
        await set_clock(self.client, START_MS + ms)

    async def another(self) -> Puller:
        """A worker that joins now."""
        return await Puller(self.broker).join()

    def job(self, **fields: Any) -> Job:
        """A job for whose answer the Router waits."""
        return make_job(reply_to=self.listener.router, **fields)


async def the_epoch_fences(scene: Scene) -> None:
    """An attempt whose job runs again elsewhere cannot settle it."""
    await scene.broker.jobs.enqueue(scene.job())
    lease = await scene.worker.claim_one()
    await scene.broker.maintenance.reclaim(scene.worker.session_id)
    again = await (await scene.another()).claim_one()
    late = replace(lease, attempt_id=again.attempt_id)
    assert await scene.broker.attempts.settle(late, Outcome.DONE, answer_frame(late)) is Settled.FENCED


async def the_attempt_id_fences(scene: Scene) -> None:
    """The right epoch is not enough: it may be guessed, or be that of a job put on the queue anew."""
    await scene.broker.jobs.enqueue(scene.job())
    lease = replace(await scene.worker.claim_one(), attempt_id="somebody")
    assert await scene.broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.FENCED


async def nobody_makes_a_reply_stream(scene: Scene) -> None:
    """A Router that is gone stays gone: nothing is written for it that nobody would ever read or trim."""
    await scene.broker.jobs.enqueue(scene.job())
    lease = await scene.worker.claim_one()
    await scene.listener.leave()
    await scene.broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease))
    assert not await scene.client.exists(KEYS.reply(scene.listener.router))


async def a_tombstone_stands(scene: Scene) -> None:
    """A late copy of an enqueue does not run a job again that has ended."""
    job = scene.job()
    await scene.broker.jobs.enqueue(job)
    lease = await scene.worker.claim_one()
    await scene.broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease))
    assert await scene.broker.jobs.enqueue(job) is State.DONE
    assert await scene.worker.claim() == []


async def a_cancel_that_comes_first_stands(scene: Scene) -> None:
    """A client that was faster than its own request is not served."""
    job = scene.job()
    await scene.broker.jobs.cancel(job.id, "the client left")
    assert await scene.broker.jobs.enqueue(job) is State.CANCELLED
    assert await scene.worker.claim() == []


async def a_line_that_runs_is_not_taken_back(scene: Scene) -> None:
    """A batch that moves what waits does not abort what runs; an unknown job may come later."""
    job = scene.job()
    await scene.broker.jobs.enqueue(job)
    lease = await scene.worker.claim_one()
    assert await scene.broker.jobs.cancel(job.id, "moved", if_queued=True) is State.LEASED
    assert await scene.broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.OK
    late = scene.job()
    assert await scene.broker.jobs.cancel(late.id, "moved", if_queued=True) is None
    assert await scene.broker.jobs.enqueue(late) is State.QUEUED


async def a_repeated_claim_gives_the_same(scene: Scene) -> None:
    """Its reply was lost: the jobs must not be leased to nobody, nor more of them given."""
    for _ in range(2):
        await scene.broker.jobs.enqueue(scene.job())
    lease = await scene.worker.claim_one()
    scene.worker.seq -= 1
    assert (await scene.worker.claim_one()).attempt_id == lease.attempt_id


async def a_late_claim_gives_nothing(scene: Scene) -> None:
    """A copy of an older claim, from a connection that was given up: its jobs would be leased to nobody."""
    assert await scene.worker.claim() == []
    assert await scene.worker.claim() == []
    await scene.broker.jobs.enqueue(scene.job())
    scene.worker.seq -= 2
    assert await scene.worker.claim() == []


async def the_dead_do_not_renew(scene: Scene) -> None:
    """Who was declared dead learns it, and does not hold the leases of its next job."""
    await scene.broker.jobs.enqueue(scene.job())
    await scene.worker.claim_one()
    await scene.broker.maintenance.reclaim(scene.worker.session_id)
    with pytest.raises(Fenced):
        await scene.broker.workers.renew(scene.worker.session_id)


async def the_dead_claim_nothing(scene: Scene) -> None:
    """Nobody would ever take its jobs back."""
    await scene.broker.maintenance.reclaim(scene.worker.session_id)
    await scene.broker.jobs.enqueue(scene.job())
    with pytest.raises(Fenced):
        await scene.worker.claim()


async def nothing_starts_late(scene: Scene) -> None:
    """A job whose time ran out in the queue is not started."""
    await scene.broker.jobs.enqueue(scene.job(ttl_ms=20))
    await scene.wait(20)
    assert await scene.worker.claim() == []


async def attempts_end(scene: Scene) -> None:
    """A job is started so often and no more."""
    await scene.broker.jobs.enqueue(scene.job(max_attempts=1))
    await scene.worker.claim_one()
    assert (await scene.broker.maintenance.reclaim(scene.worker.session_id)).dead == 1


async def a_lost_stream_waits(scene: Scene) -> None:
    """Run at once, it would repeat what was delivered."""
    await scene.broker.jobs.enqueue(scene.job(stream=True, on_loss="continue"))
    await scene.worker.claim_one()
    await scene.broker.maintenance.reclaim(scene.worker.session_id)
    assert await (await scene.another()).claim() == []


async def an_old_resume_is_void(scene: Scene) -> None:
    """Said of an earlier loss, it would repeat what was delivered since."""
    job = scene.job(stream=True, on_loss="continue")
    await scene.broker.jobs.enqueue(job)
    for epoch in (2, 3):
        worker = await scene.another()
        await worker.claim_one()
        await scene.broker.maintenance.reclaim(worker.session_id)
        if epoch == 2:
            await scene.broker.jobs.resume(job, 2)
    assert await scene.broker.jobs.resume(job, 2) is State.LOST


async def a_worker_holds_one_suspect(scene: Scene) -> None:
    """Two at once, and a crash would not tell which of them did it."""
    for _ in range(2):
        await scene.broker.jobs.enqueue(scene.job())
    await scene.broker.attempts.report_crash(await scene.worker.claim(2), "it crashed")
    assert len(await (await scene.another()).claim(2)) == 1


async def a_repeated_release_is_known(scene: Scene) -> None:
    """A job that was handed back, and the reply lost, is not handed back once more by whoever has it now."""
    await scene.broker.jobs.enqueue(scene.job())
    lease = await scene.worker.claim_one()
    await scene.broker.attempts.release(lease, "draining", counted=False)
    assert await scene.broker.attempts.release(lease, "draining", counted=False) is Settled.DUPLICATE


async def the_budget_holds(scene: Scene) -> None:
    """What ends gives its room back, once."""
    await scene.broker.jobs.enqueue(scene.job())
    lease = await scene.worker.claim_one()
    await scene.broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease))
    assert not await scene.client.exists(KEYS.budget)


async def what_does_not_run_is_handed_back(scene: Scene) -> None:
    """Redis lost that an attempt ended: its worker says so, and the job waits again."""
    await scene.broker.jobs.enqueue(scene.job())
    await scene.worker.claim_one()
    await scene.broker.workers.reconcile_leases(0, scene.worker.session_id, scene.worker.seq, ())
    await (await scene.another()).claim_one()


async def a_late_comparison_takes_nothing(scene: Scene) -> None:
    """What was claimed since a worker compared is not in what it said."""
    await scene.broker.jobs.enqueue(scene.job())
    seq = scene.worker.seq
    lease = await scene.worker.claim_one()
    await scene.broker.workers.reconcile_leases(0, scene.worker.session_id, seq, ())
    assert await scene.broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.OK


async def no_epoch_of_a_lost_attempt_comes_again(scene: Scene) -> None:
    """Redis lost epoch 2 and who had it: what is handed back begins far above."""
    await scene.broker.jobs.enqueue(scene.job())
    await scene.worker.claim_one()
    await scene.broker.workers.reconcile_leases(0, scene.worker.session_id, scene.worker.seq, ())
    assert (await scene.worker.claim_one()).epoch > 2


async def what_waits_is_raised(scene: Scene) -> None:
    """Redis lost that a job ran: its next attempt is not of the epoch that the Router has heard frames of."""
    job = scene.job()
    await scene.broker.jobs.enqueue(job)
    await scene.broker.jobs.raise_epoch(job.id, 1)
    assert (await scene.worker.claim_one()).epoch > 1


async def the_router_is_told(scene: Scene) -> None:
    """Whoever listens hears that an attempt ended, or it would wait for frames of it."""
    await scene.broker.jobs.enqueue(scene.job())
    await scene.worker.claim_one()
    await scene.broker.maintenance.reclaim(scene.worker.session_id)
    assert [item.kind for item in await scene.listener.received()] == [MarkerKind.REQUEUED]  # type: ignore[union-attr]


async def a_new_attempt_has_a_new_epoch(scene: Scene) -> None:
    """By it a Router tells old frames from new ones."""
    await scene.broker.jobs.enqueue(scene.job())
    lease = await scene.worker.claim_one()
    await scene.broker.maintenance.reclaim(scene.worker.session_id)
    assert (await (await scene.another()).claim_one()).epoch > lease.epoch


async def nothing_starts_for_nobody(scene: Scene) -> None:
    """A job whose Router is gone would cost an engine's time, and its answer be read by nobody."""
    await scene.broker.jobs.enqueue(scene.job())
    await scene.listener.leave()
    assert await scene.worker.claim() == []


async def nothing_starts_again_for_nobody(scene: Scene) -> None:
    """The same when its attempt was lost."""
    await scene.broker.jobs.enqueue(scene.job())
    await scene.worker.claim_one()
    await scene.listener.leave()
    assert (await scene.broker.maintenance.reclaim(scene.worker.session_id)).cancelled == 1


async def neighbours_of_a_suspect_go_free(scene: Scene) -> None:
    """A crash is the suspect's: who ran beside it spends no attempt."""
    await scene.broker.jobs.enqueue(scene.job())
    await scene.broker.attempts.report_crash([await scene.worker.claim_one()], "it crashed")
    neighbour = scene.job(max_attempts=1)
    await scene.broker.jobs.enqueue(neighbour)
    await scene.broker.attempts.report_crash(await (await scene.another()).claim(2), "it crashed")
    assert await scene.broker.jobs.enqueue(neighbour) is State.QUEUED


async def a_suspect_is_cleared_by_itself(scene: Scene) -> None:
    """Clearing another job does not give its worker a second suspect."""
    for _ in range(2):
        await scene.broker.jobs.enqueue(scene.job())
    await scene.broker.attempts.report_crash(await scene.worker.claim(2), "it crashed")
    await scene.broker.jobs.enqueue(scene.job())
    other = await scene.another()
    (plain,) = [lease for lease in await other.claim(2) if not lease.suspect]
    await scene.broker.attempts.clear_suspicion(plain)
    assert await other.claim(2) == []


async def the_dying_do_not_join(scene: Scene) -> None:
    """A late copy of a join does not let in who is being reclaimed."""
    for _ in range(3):
        await scene.broker.jobs.enqueue(scene.job())
    await scene.worker.claim(2)
    name = scene.worker.session_id
    await scene.broker._caller.script("reclaim", KEYS.budget, KEYS.prefix, name, 1, 1, "its worker was lost")
    await scene.broker.workers.join(name)
    with pytest.raises(Fenced):
        await scene.worker.claim()


async def the_last_attempt_is_fenced(scene: Scene) -> None:
    """An attempt that was taken away, and its job declared dead, did not end it by its own word."""
    await scene.broker.jobs.enqueue(scene.job(max_attempts=1))
    lease = await scene.worker.claim_one()
    await scene.broker.maintenance.reclaim(scene.worker.session_id)
    assert await scene.broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.FENCED


async def nothing_is_handed_over_past_what_waits(scene: Scene) -> None:
    """A job that its worker may not have again so soon was there first."""
    await scene.worker.claim(2, offer=2)
    await scene.broker.jobs.enqueue(scene.job())
    (lease,) = await scene.worker.handed()
    await scene.broker.attempts.release(lease, "the engine was busy", counted=True)
    await scene.broker.jobs.enqueue(scene.job())
    assert await scene.worker.handed() == []


async def what_is_on_its_way_has_a_slot(scene: Scene) -> None:
    """A claim that crosses with a handed job brings one less."""
    await scene.worker.claim(1, offer=1)
    await scene.broker.jobs.enqueue(scene.job())
    await scene.broker.jobs.enqueue(scene.job())
    assert await scene.worker.claim(1, offer=1) == []


async def what_is_on_its_way_is_not_taken_back(scene: Scene) -> None:
    """A worker that reconciles its leases does not run what it has not read of."""
    await scene.worker.claim(1, offer=1)
    await scene.broker.jobs.enqueue(scene.job())
    await scene.broker.workers.reconcile_leases(0, scene.worker.session_id, scene.worker.seq, ())
    (lease,) = await scene.worker.handed()
    assert await scene.broker.attempts.settle(lease, Outcome.DONE, answer_frame(lease)) is Settled.OK


async def nobody_makes_a_control_stream(scene: Scene) -> None:
    """A worker whose stream is gone would not read of a job."""
    await scene.worker.claim(1, offer=1)
    await scene.client.delete(KEYS.control(scene.worker.session_id))
    await scene.broker.jobs.enqueue(scene.job())
    assert len(await (await scene.another()).claim(1)) == 1


async def _line(scene: Scene, lane: Lane = Lane.BATCH, **fields: Any) -> Lease:
    """The attempt of a job that may yield, on a worker that has no other slot."""
    await scene.broker.jobs.enqueue(make_job(lane=lane, **({"yields": 1} | fields)))
    return await scene.worker.claim_one(lanes=[lane])


async def _asked(scene: Scene) -> int:
    """How many attempts the worker was asked to have yield, by now."""
    entries = await scene.client.xrange(KEYS.control(scene.worker.session_id))
    return sum(fields.get(b"k") == b"yield" for _, fields in entries)


async def only_interactive_jobs_have_others_yield(scene: Scene) -> None:
    """What comes for a lower lane costs no look at what runs."""
    await scene.broker.jobs.enqueue(make_job())
    await _line(scene)
    await scene.broker.jobs.enqueue(make_job(lane=Lane.BACKGROUND))
    assert await _asked(scene) == 0


async def lower_lanes_keep_their_part(scene: Scene) -> None:
    """A saturating interactive load does not starve them."""
    for _ in range(7):
        await scene.broker.jobs.enqueue(make_job())
    await scene.worker.claim(7)
    await _line(scene)
    await scene.broker.jobs.enqueue(make_job())
    assert await _asked(scene) == 0


async def one_yields_for_each_that_waits(scene: Scene) -> None:
    """Not all that run for the first that comes, when the sweep comes by."""
    for _ in range(2):
        await _line(scene)
    await scene.broker.jobs.enqueue(make_job())
    await scene.broker.maintenance.expire()
    assert await _asked(scene) == 1


async def an_attempt_is_asked_once(scene: Scene) -> None:
    """It may be on its way: what waits next is for another one."""
    await _line(scene)
    for _ in range(2):
        await scene.broker.jobs.enqueue(make_job())
    assert await _asked(scene) == 1


async def a_region_has_its_own_yield(scene: Scene) -> None:
    """A worker elsewhere may not run the job."""
    await _line(scene)
    await scene.broker.jobs.enqueue(make_job(region="eu", remote_after_ms=60_000))
    assert await _asked(scene) == 0


async def no_others_are_taken(scene: Scene) -> None:
    """By a worker that may run its region's jobs alone: not even while it is free."""
    worker = await Puller(scene.broker, region="eu", others=False).join()
    await scene.broker.jobs.enqueue(make_job())
    assert await worker.claim(1) == []


async def no_others_are_announced(scene: Scene) -> None:
    """To such a worker: whom they are for would not hear of them."""
    worker = await Puller(scene.broker, region="eu", others=False).join()
    await worker.claim(1)
    await scene.broker.jobs.enqueue(make_job())
    assert await worker.control_messages() == []


async def no_others_are_yielded_to(scene: Scene) -> None:
    """By such a worker."""
    worker = await Puller(scene.broker, region="eu", others=False).join()
    await scene.broker.jobs.enqueue(make_job(lane=Lane.BATCH, yields=1, region="eu", remote_after_ms=60_000))
    await worker.claim_one()
    await scene.broker.jobs.enqueue(make_job())
    assert ControlKind.YIELD not in [message.kind for message in await worker.control_messages()]


async def what_has_ended_is_not_asked(scene: Scene) -> None:
    """Nor does it stand in the way of what may yield."""
    first = await _line(scene)
    await scene.wait(10)
    await scene.broker.attempts.settle(await _line(scene), Outcome.DONE)
    assert await scene.client.zrange(KEYS.yieldable(MODEL), 0, -1) == [first.job.id.encode()]


async def a_job_yields_so_often_and_no_more(scene: Scene) -> None:
    """Then it runs to its end."""
    await scene.broker.attempts.release_yielded(await _line(scene), "it yields")
    await scene.worker.claim_one()
    await scene.broker.jobs.enqueue(make_job())
    assert await _asked(scene) == 0


async def a_yield_is_not_charged(scene: Scene) -> None:
    """It is no fault of the job's."""
    await scene.broker.attempts.release_yielded(await _line(scene, max_attempts=1), "it yields")
    assert (await scene.worker.claim_one()).attempt == 1


async def what_it_said_is_kept(scene: Scene) -> None:
    """Or the job would begin anew each time."""
    lease = await _line(scene)
    await scene.broker.attempts.release_yielded(lease, "it yields", replace(lease.job, prefix="Once"))
    assert (await scene.worker.claim_one()).job.prefix == "Once"


async def what_it_said_is_in_the_budget(scene: Scene) -> None:
    """And returned at the end."""
    lease = await _line(scene)
    await scene.broker.attempts.release_yielded(lease, "it yields", replace(lease.job, prefix="Once"))
    await scene.broker.attempts.settle(await scene.worker.claim_one(), Outcome.DONE)
    assert not await scene.client.exists(KEYS.budget)


async def a_suspect_runs_to_its_end(scene: Scene) -> None:
    """Each of its attempts is one in which a crash can be told."""
    await scene.broker.attempts.report_crash([await _line(scene)], "it crashed")
    await scene.wait(3_000)
    assert (await scene.worker.claim_one()).suspect
    await scene.broker.jobs.enqueue(make_job())
    assert await _asked(scene) == 0


Scenario = Callable[[Scene], Awaitable[None]]
SAME = "local same = job.epoch == epoch and job.aid == aid"
RELEASED = "if releasing and job.handed_back == epoch .. ':' .. aid then return nil, 'duplicate' end"


async def _served(scene: Scene, jobs: int) -> None:
    """So many jobs were done in a second each, and one runs."""
    for _ in range(jobs):
        await scene.broker.jobs.enqueue(make_job())
        await scene.broker.attempts.settle(await scene.worker.claim_one(), Outcome.DONE, used=1, run_ms=1_000)
    await scene.broker.jobs.enqueue(make_job())
    await scene.worker.claim_one()


async def _is_refused(scene: Scene, patience_ms: int, **fields: Any) -> bool:
    try:
        await scene.broker.jobs.start_enqueue(make_job(**fields), patience_ms)
    except WaitTooLong:
        return True
    return False


async def who_would_wait_too_long_is_refused(scene: Scene) -> None:
    """It would hold a place until its deadline, for nothing."""
    await _served(scene, 8)
    assert await _is_refused(scene, 400)


async def little_seen_refuses_nobody(scene: Scene) -> None:
    """The first jobs of a model say nothing of the next."""
    await _served(scene, 7)
    assert not await _is_refused(scene, 400)


async def who_may_not_wait_is_refused(scene: Scene) -> None:
    """Whatever is known of the wait."""
    assert await _is_refused(scene, 0)


async def a_free_slot_refuses_nobody(scene: Scene) -> None:
    """Also one for a request that is too large to be handed over."""
    await scene.worker.claim(1, offer=1)
    assert not await _is_refused(scene, 0, body=b"x" * 300_000)


async def who_leaves_is_charged_for_what_was_said(scene: Scene) -> None:
    """Else a client that closes each stream just before its end has its tenant served first for ever."""
    for tenant in ("greedy", "acme") * 2:
        await scene.broker.jobs.enqueue(make_job(tenant=tenant, cost_estimate=100))
    greedy = next(lease for lease in await scene.worker.claim(2) if lease.job.tenant == "greedy")
    await scene.broker.jobs.cancel(greedy.job.id, "its client went away", used=8_000)
    standing = dict(
        await scene.client.zrange(f"{KEYS.prefix}active:{queue_key(MODEL, Lane.INTERACTIVE)}:2", 0, -1, withscores=True)
    )
    assert standing == {b"greedy": 8_000.0, b"acme": 100.0}


async def a_debt_is_not_forgotten(scene: Scene) -> None:
    """Of a tenant that stood below all when it left: what it was charged too little stands above what all have had."""
    leases = {}
    for tenant, cost in (("greedy", 10), ("acme", 100)):
        await scene.broker.jobs.enqueue(make_job(tenant=tenant, cost_estimate=cost))
        leases[tenant] = await scene.worker.claim_one()
    await scene.broker.attempts.settle(leases["greedy"], Outcome.DONE, answer_frame(leases["greedy"]), used=8_000)
    service = f"{KEYS.prefix}service:{queue_key(MODEL, Lane.INTERACTIVE)}:2"
    assert await scene.client.zscore(service, "greedy") == 10 + 100 + 7_990


async def a_parked_worker_refuses_nobody(scene: Scene) -> None:
    """One that offers nothing has a free slot, and will be woken."""
    await scene.worker.claim(1)
    assert not await _is_refused(scene, 0)


async def a_full_worker_frees_nothing(scene: Scene) -> None:
    """One of many queues stands among the parked when what it offered is used up."""
    await scene.worker.claim(1)
    await scene.client.hset(KEYS.claimed(scene.worker.session_id), "full", 1)
    assert await _is_refused(scene, 0)


GUARDS: list[tuple[Scenario, Rewrite]] = [
    (who_leaves_is_charged_for_what_was_said, Rewrite("cancel", "correct(job, used) end", "end")),
    (a_debt_is_not_forgotten, Rewrite("fairness", " or one.by > 0 and served[1]\n", "\n")),
    (
        a_parked_worker_refuses_nobody,
        Rewrite("enqueue", "(least_loaded(at) or is_parked_at(at, now))", "least_loaded(at)"),
    ),
    (a_full_worker_frees_nothing, Rewrite("parking", "if not call('HGET', P .. 'claimed:' .. id, 'full') then", "do")),
    (who_would_wait_too_long_is_refused, Rewrite("enqueue", " > tonumber(patience)", " > 1e12")),
    (little_seen_refuses_nobody, Rewrite("prediction", "sums[':ran'] < KNOWN_JOBS or ", "")),
    (who_may_not_wait_is_refused, Rewrite("enqueue", "patience == '0' or ", "")),
    (a_free_slot_refuses_nobody, Rewrite("enqueue", "patience ~= '' and not is_free", "patience ~= ''")),
    (the_epoch_fences, Rewrite("fence", SAME, "local same = job.aid == aid")),
    (the_attempt_id_fences, Rewrite("fence", SAME, "local same = job.epoch == epoch")),
    (nobody_makes_a_reply_stream, Rewrite("listeners", "'NOMKSTREAM', '*', field", "'*', field")),
    (a_tombstone_stands, Rewrite("lifecycle", "leave_tombstone(job.id,", "call('DEL', P .. 'job:' .. job.id,")),
    (
        a_line_that_runs_is_not_taken_back,
        Rewrite("cancel", "if condition == '2' and before ~= 'queued' then return before end", ""),
    ),
    (
        a_line_that_runs_is_not_taken_back,
        Rewrite("cancel", "if condition == '0' and abandoned_ms == 0 then", "if abandoned_ms == 0 then"),
    ),
    (a_cancel_that_comes_first_stands, Rewrite("cancel", "leave_tombstone(id, 'cancelled', '0', '')", "")),
    (a_repeated_claim_gives_the_same, Rewrite("claim", "if last[1] == seq then", "if false then")),
    (a_late_claim_gives_nothing, Rewrite("claim", "tonumber(seq) < tonumber(last[1])", "false")),
    (the_dead_do_not_renew, Rewrite("renew", "if is_fenced(session_id) then return -1 end", "")),
    (the_dead_claim_nothing, Rewrite("claim", "if is_fenced(session_id) then return { 'fenced' } end", "")),
    (nothing_starts_late, Rewrite("claim", "job and tonumber(job.deadline) <= now", "false")),
    (attempts_end, Rewrite("attempts", "if attempts >= tonumber(job.max) then", "if false then")),
    (a_lost_stream_waits, Rewrite("attempts", "job.resume == '1' and 'lost' or 'requeued'", "'requeued'")),
    (an_old_resume_is_void, Rewrite("resume", "job.state ~= 'lost' or job.epoch ~= epoch", "job.state ~= 'lost'")),
    (a_worker_holds_one_suspect, Rewrite("claim", "not held_suspect and take_from_stream", "take_from_stream")),
    (a_repeated_release_is_known, Rewrite("fence", RELEASED, "")),
    (what_does_not_run_is_handed_back, Rewrite("reconcile_leases", "elseif job and", "elseif false and")),
    (a_late_comparison_takes_nothing, Rewrite("reconcile_leases", "'seq') or 0) > seq", "'seq') or 0) < 0")),
    (no_epoch_of_a_lost_attempt_comes_again, Rewrite("reconcile_leases", "next_run(job.epoch) - 1", "job.epoch")),
    (what_waits_is_raised, Rewrite("raise_epoch", "if job.state == 'queued' and epoch < above then", "if false then")),
    (the_budget_holds, Rewrite("finish", "spend(job.pool, job.tenant, -1, -tonumber(job.size))", "")),
    (the_router_is_told, Rewrite("notify", "send(router, 'm', marker, ids)", "local _ = router")),
    (a_new_attempt_has_a_new_epoch, Rewrite("attempts", "int(tonumber(job.epoch) + 1)", "job.epoch")),
    (nothing_starts_for_nobody, Rewrite("claim", "job and nobody_waits(job)", "false")),
    (nothing_starts_again_for_nobody, Rewrite("attempts", "if nobody_waits(job) then", "if false then")),
    (neighbours_of_a_suspect_go_free, Rewrite("attempts", "not any_suspect or is_suspect(job)", "true")),
    (a_suspect_is_cleared_by_itself, Rewrite("clear_suspicion", "if not is_suspect(job) then return 'ok' end", "")),
    (the_dying_do_not_join, Rewrite("join", "if number < 0 then return number end", "")),
    (the_last_attempt_is_fenced, Rewrite("reclaim", "job.aid = ''", "")),
    (nothing_is_handed_over_past_what_waits, Rewrite("handoff", "waiting(key) == 0 and ", "")),
    (what_is_on_its_way_has_a_slot, Rewrite("claim", "math.max(wanted - on_their_way, 0)", "wanted")),
    (what_is_on_its_way_is_not_taken_back, Rewrite("reconcile_leases", "and is_unread(job.entry)", "and false")),
    (nobody_makes_a_control_stream, Rewrite("handoff", "'NOMKSTREAM', '*', 'k', 'job'", "'*', 'k', 'job'")),
    (only_interactive_jobs_have_others_yield, Rewrite("preemption", ":interactive(", ":[^:@]*(")),
    (a_region_has_its_own_yield, Rewrite("preemption", "pool .. region, int", "pool, int")),
    (no_others_are_taken, Rewrite("claim", "or not takes_others and { own }", "")),
    (no_others_are_announced, Rewrite("claim", "if takes_others then local_keys", "if true then local_keys")),
    (no_others_are_yielded_to, Rewrite("preemption", "if kind ~= '=' then", "if true then")),
    (lower_lanes_keep_their_part, Rewrite("preemption", "lower * LOWER_PART <=", "lower * 99 <=")),
    (one_yields_for_each_that_waits, Rewrite("preemption", ">= waiting(", "< 0 * waiting(")),
    (an_attempt_is_asked_once, Rewrite("preemption", "mark(job, 'ZADD', int(-now), id)", "")),
    (what_has_ended_is_not_asked, Rewrite("leases", "note_end(job)", "")),
    (a_job_yields_so_often_and_no_more, Rewrite("release", "int(left - 1)", "'1'")),
    (a_yield_is_not_charged, Rewrite("release", "job, false, reason", "job, true, reason")),
    (what_it_said_is_kept, Rewrite("release", "size > 0 and outcome == 'requeued'", "false")),
    (what_it_said_is_in_the_budget, Rewrite("release", "job.size = int(size)", "")),
    (a_suspect_runs_to_its_end, Rewrite("preemption", " or is_suspect(job)", "")),
]  # fmt: skip


async def play(scenario: Scenario, *rewrites: Rewrite) -> None:
    """A scenario on an empty queue of its own, at a time of its own."""
    server = fakeredis.FakeServer()
    queue = Broker.over(fakeredis.FakeAsyncRedis(server=server, protocol=2), retry_limit_ms=1_000)
    queue._caller._scripts = rewritten(load_scripts(flags=False), CLOCK_OF_TESTS, *rewrites)
    client = fakeredis.FakeAsyncRedis(server=server, protocol=2)
    try:
        await set_clock(client, START_MS)
        worker = await Puller(queue, new_session_id("worker")).join()
        await scenario(Scene(queue, worker, await Listener(client).open(), client))
    finally:
        await queue.close()
        await client.aclose()


@pytest.mark.parametrize(("scenario", "without"), GUARDS, ids=[scenario.__name__ for scenario, _ in GUARDS])
async def test_a_guard_is_needed(scenario: Scenario, without: Rewrite) -> None:
    """The scenario holds with the guard, and fails without it."""
    rewritten(load_scripts(flags=False), without)  # its text is there
    await play(scenario)
    with pytest.raises((AssertionError, pytest.fail.Exception, ValueError)):
        await play(scenario, without)


@pytest.mark.parametrize(
    "stale",
    [
        Rewrite("fence", "a text that is not there", ""),
        Rewrite("claim", "local now = now_ms()\n\nif true then", ""),
        Rewrite("fence", "return nil", ""),
        Rewrite("unclaim", "local", ""),
    ],
    ids=["nowhere", "changed", "more than once", "no such script"],
)
def test_a_rewrite_that_does_not_apply_is_refused(stale: Rewrite) -> None:
    """A guard whose text has changed is not left unproved in silence."""
    with pytest.raises(AssertionError, match=r"adapt the rewrite|no script or library"):
        rewritten(load_scripts(flags=True), stale)


def test_a_rewrite_changes_what_is_sent() -> None:
    """Every script that uses what changes of a library gets another source and another name; the others keep theirs."""
    before, after = load_scripts(flags=True), rewritten(load_scripts(flags=True), CLOCK_OF_TESTS)
    same = {name for name in before if before[name].sha == after[name].sha}
    assert same == {name for name in before if "local function now_ms" not in before[name].source}
    assert same
