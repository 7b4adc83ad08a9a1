"""Rules about claims: numbers, slots, repeated and held calls, messages of all kinds."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from ..scorecard import Broken, NotChecked, Rule
from ..scripted_engine import event, plain_answer, whole_stream
from ..scripted_queue import MODEL, chat, given
from ..scripted_router import Fault
from ..worker_kit import SLOTS, WorkerKit
from .checks import check_answer, require


async def _claims(kit: WorkerKit) -> None:
    await kit.run(*[chat(f"plain {n}") for n in range(6)])
    claims = kit.queue.claims
    for earlier, later in pairwise(claims):
        require(later.seq in (earlier.seq, earlier.seq + 1), f"claim {later.seq} follows claim {earlier.seq}")
    for claim in claims:
        require(claim.n <= SLOTS, f"a claim asks for {claim.n} jobs; there are {SLOTS} slots")
        require({pool.pool for pool in claim.pools} <= {MODEL}, f"a claim names {claim.pools}; {MODEL} was assigned")
    require(claims[-1].turn > claims[0].turn, "turn does not count the jobs that were claimed")


async def _keeps_to_slots(kit: WorkerKit) -> None:
    jobs = [chat("pause 300") for _ in range(3 * SLOTS)]
    await kit.run(*jobs)
    most = kit.engine.most_running
    require(most <= SLOTS, f"{most} jobs ran at once; there are {SLOTS} slots")
    require(most == SLOTS, f"only {most} jobs ran at once, though {3 * SLOTS} waited for {SLOTS} slots")


async def _claims_for_free_slots(kit: WorkerKit) -> None:
    held = [chat("held", stream=True) for _ in range(SLOTS - 1)]
    for job in held:
        await kit.begun(job)
    last = chat("held", stream=True)
    await kit.begun(last)
    kit.queue.abort(last)
    await kit.until(lambda: kit.engine.running == SLOTS - 1, "it stops the job that was aborted")
    [attempt] = await kit.run(chat("plain after"), limit_s=5.0)
    check_answer(attempt, plain_answer("plain after"), content_type="application/json")
    for job in held:
        require(not job.last.ended, "a running job ended though nothing was said of it")


async def _repeats_claims(kit: WorkerKit) -> None:
    kit.router.fail_next("claim", Fault(carried_out=True))
    [attempt] = await kit.run(chat("plain once"), limit_s=20.0)
    await asyncio.sleep(0.5)
    require(len(attempt.job.attempts) == 1, "a claim whose answer was lost was not repeated with its own number")
    ran = sum(1 for call in kit.engine.calls if b"plain once" in call.body)
    require(ran == 1, f"the job was run {ran} times")
    check_answer(attempt, plain_answer("plain once"), content_type="application/json")


async def _reconciles(kit: WorkerKit) -> None:
    kept, lost = chat("held", stream=True), chat("held", stream=True)
    for job in (kept, lost):
        await kit.begun(job)
    kit.router.lost_leases.add(lost.last.lease)
    seen = kit.router.seen
    before = len(seen.reconciles)
    kit.router.refusals["claim"] = (503, "broker_unavailable")
    kit.queue.tell("wake")
    await asyncio.sleep(1.0)
    kit.router.refusals.clear()
    await kit.until(lambda: len(seen.reconciles) > before, "it reconciles after claims have failed", limit_s=20.0)
    require(seen.reconciles[-1].after != "0", "its reconcile does not say which messages it has read")
    named = seen.reconciles[-1].leases
    require(
        {kept.last.lease, lost.last.lease} <= set(named), f"its reconcile names {len(named)} leases; it runs two jobs"
    )
    await kit.until(lambda: kit.engine.running == 1, "it stops the attempt that is lost, and no other")
    kit.engine.release.set()
    await kit.until(lambda: kept.last.ended, "the other one is settled")
    check_answer(kept.last, whole_stream(1), content_type="text/event-stream")
    require(not lost.last.settles, "it settled a lease that is lost")


async def _aborts(kit: WorkerKit) -> None:
    job = chat("held", stream=True)
    attempt = await kit.begun(job)
    kit.queue.abort(job)
    await kit.until(lambda: kit.engine.running == 0, "it closes the engine's connection when its job is aborted")
    kit.engine.release.set()
    pieces = len(attempt.pieces)
    await kit.stays(
        lambda: not attempt.settles and len(attempt.pieces) == pieces, "it sends output of a job that was aborted"
    )


async def _ignores_the_unknown(kit: WorkerKit) -> None:
    kit.queue.tell("dance", tempo="allegro", steps=[1, 2, 3])
    kit.queue.tell("wake", a_field_of_a_later_version={"deep": [1]})
    [attempt] = await kit.run(chat("stream 2", stream=True))
    check_answer(attempt, whole_stream(2), content_type="text/event-stream")


async def _moves_on(kit: WorkerKit) -> None:
    for kind in ("wake", "ping", "wake"):
        kit.queue.tell(kind)
    first = chat("held", stream=True)
    await kit.begun(first)
    kit.queue.abort(first)
    await kit.until(lambda: kit.engine.running == 0, "an abort behind other messages is acted on")
    calls = kit.router.seen.calls["claim"]
    await asyncio.sleep(1.0)
    asked = kit.router.seen.calls["claim"] - calls
    require(asked <= 20, f"it asked {asked} times in a second while nothing was to be had: after does not move on")


async def _runs_once(kit: WorkerKit) -> None:
    if not any(claim.offer for claim in kit.queue.claims):
        raise NotChecked("it makes no offer, so no job is handed to it")
    attempt = kit.queue.begin(chat("pause 300"))
    for _ in range(2):
        kit.queue.tell("job", job=given(attempt))
    await kit.until(lambda: attempt.ended, "a job that is handed over is run")
    check_answer(attempt, plain_answer("pause 300"), content_type="application/json")
    await asyncio.sleep(0.5)
    require(len(kit.engine.calls) == 1, f"a job that was delivered twice was run {len(kit.engine.calls)} times")


async def _finds_first_piece(kit: WorkerKit) -> None:
    attempt = await kit.begun(chat("held", stream=True))
    if attempt.output != event(0):
        raise Broken(f"the first piece of a stream that goes on is {attempt.output[:80]!r}")


CLAIM_RULES: tuple[Rule[WorkerKit], ...] = (
    Rule("claim-numbers", "each new claim has the next number, and asks for what is assigned and free", _claims),
    Rule("slots", "it runs as many jobs as it has slots, and no more", _keeps_to_slots),
    Rule("free-slot", "a slot that becomes free while a call is held is claimed for soon", _claims_for_free_slots),
    Rule("repeated-claim", "a claim whose answer is lost is repeated, and its jobs are run once", _repeats_claims),
    Rule("reconcile", "after a failed claim it says what it runs, and stops what it has lost", _reconciles),
    Rule("abort", "it stops a job that is aborted, at the engine too, and sends nothing more of it", _aborts),
    Rule("messages", "it acts on messages in their order, each once", _moves_on),
    Rule("unknown-messages", "it ignores messages and fields that it does not know", _ignores_the_unknown),
    Rule("delivered-twice", "a job that is handed over twice is run once", _runs_once),
    Rule("first-piece", "it sends the first piece of a stream at once", _finds_first_piece),
)
