"""The guards of affinity: with each a scenario holds, and with it taken out the same scenario fails."""

from __future__ import annotations

import pytest

from broker.redis.scripts import load_scripts
from queue_schemas import Lane
from scheduling.affinity import MAX_HOLDERS, SLOT_CHARS
from tests.support.queue import MODEL, Puller

from .rewriting import Rewrite, rewritten
from .test_affinity import KEYS, WAITS_AT
from .test_guards import Scenario, Scene, play

MINE, THEIRS = "m" * 12, "t" * 12


async def _holds(scene: Scene, worker: Puller, digests: str) -> None:
    """The worker is leased a job with these digests, and nothing waits."""
    await scene.broker.jobs.enqueue(scene.job(affinity=digests))
    (lease,) = await worker.claim(1)
    assert lease.job.affinity == digests


async def _wait_is(scene: Scene, ms: int) -> None:
    await scene.client.hset(KEYS.counters, f"{WAITS_AT}:wait", ms)


async def load_stays_within_the_bound(scene: Scene) -> None:
    """A warm worker is left alone once another has more than twice its free slots and one."""
    for digests in (MINE, "", "", "", ""):
        await _holds(scene, scene.worker, digests)
    other = await scene.another()
    assert await scene.worker.claim(3, offer=3, slots=8) == await other.claim(8, offer=8) == []
    await scene.broker.jobs.enqueue(scene.job(affinity=MINE))
    assert (len(await scene.worker.handed()), len(await other.handed())) == (0, 1)


async def _forgets(scene: Scene, number: int) -> Puller:
    """The cache that holds ``MINE`` has this number now; another worker has one free slot more, and is answered."""
    await _holds(scene, scene.worker, MINE)
    other, worker = await scene.another(), scene.worker
    await scene.broker.workers.claim(0, worker.session_id, 9, 1, 7, [(MODEL, tuple(Lane))], offer=7, cache=number)
    assert await other.claim(8, offer=8) == []
    return other


async def a_lost_cache_is_cold(scene: Scene) -> None:
    """What an engine held before it restarted counts no more."""
    other = await _forgets(scene, 2)
    await scene.broker.jobs.enqueue(scene.job(affinity=MINE))
    assert (len(await scene.worker.handed()), len(await other.handed())) == (0, 1)


async def half_a_cache_is_warm(scene: Scene) -> None:
    """What was leased under the number before is held yet."""
    other = await _forgets(scene, 1)
    await scene.broker.jobs.enqueue(scene.job(affinity=MINE))
    assert (len(await scene.worker.handed()), len(await other.handed())) == (1, 0)


async def a_cache_is_one_holder(scene: Scene) -> None:
    """Under whatever number: a newer one takes the place of an older one."""
    await half_a_cache_is_warm(scene)
    slot = await scene.client.hget(KEYS.warm, MINE[:SLOT_CHARS])
    assert slot is not None and slot.decode().split() == [MINE[SLOT_CHARS:], f"{scene.worker.session_id}#1"]


async def slots_that_became_free_count(scene: Scene) -> None:
    """A worker does not claim each time that a job ends: it offers fewer slots than are free by then."""
    await _holds(scene, scene.worker, MINE)
    other = await scene.another()
    assert await scene.worker.claim(1, offer=1, slots=8) == await other.claim(4, offer=4, slots=8) == []
    await scene.broker.jobs.enqueue(scene.job(affinity=MINE))
    assert (len(await scene.worker.handed()), len(await other.handed())) == (1, 0)


async def a_warm_worker_takes_what_it_offers(scene: Scene) -> None:
    """It may hold a prefix and not take jobs of that lane now."""
    await _holds(scene, scene.worker, MINE)
    other = await scene.another()
    assert await scene.worker.claim(8, lanes=[Lane.BATCH], offer=8) == await other.claim(8, offer=8) == []
    await scene.broker.jobs.enqueue(scene.job(affinity=MINE))
    assert (len(await scene.worker.handed()), len(await other.handed())) == (0, 1)


async def a_slot_is_no_proof(scene: Scene) -> None:
    """Two digests may share a slot of the table: the other one is not taken for this."""
    await _holds(scene, scene.worker, MINE)
    other = await scene.another()
    assert await scene.worker.claim(7, offer=7) == await other.claim(8, offer=8) == []
    await scene.broker.jobs.enqueue(scene.job(affinity=MINE[:3] + "x" * 9))
    assert (len(await scene.worker.handed()), len(await other.handed())) == (0, 1)


async def _two_wait(scene: Scene) -> None:
    """One that another worker holds, and behind it one that this worker holds."""
    await _holds(scene, scene.worker, MINE)
    await _holds(scene, await scene.another(), THEIRS)
    await scene.broker.jobs.enqueue(scene.job(affinity=THEIRS))
    await scene.broker.jobs.enqueue(scene.job(affinity=MINE))
    await _wait_is(scene, 100)


async def a_patience_ends(scene: Scene) -> None:
    """The job at the head is not overtaken for ever."""
    await _two_wait(scene)
    await scene.wait(100)
    assert (await scene.worker.claim_one()).job.affinity == THEIRS


async def within_it_the_warm_job_is_taken(scene: Scene) -> None:
    """And the other one left to its worker."""
    await _two_wait(scene)
    await scene.wait(99)
    assert (await scene.worker.claim_one()).job.affinity == MINE


async def a_retry_tells_no_wait(scene: Scene) -> None:
    """What ran for an hour and waits again has not waited for an hour: nobody may be overtaken for so long."""
    await scene.broker.jobs.enqueue(scene.job())
    lease = await scene.worker.claim_one()
    await scene.wait(2_000)
    await scene.broker.attempts.release(lease, "it drains", counted=False)
    for digests in (MINE, THEIRS):
        await scene.broker.jobs.enqueue(scene.job(affinity=digests))
    assert len(await scene.worker.claim(1)) == 1
    assert int(await scene.client.hget(KEYS.counters, f"{WAITS_AT}:wait")) < 2_000


async def few_holders_are_kept(scene: Scene) -> None:
    """What one digest takes is bounded, however many workers serve it."""
    for _ in range(MAX_HOLDERS + 1):
        await _holds(scene, await scene.another(), MINE)
    assert len((await scene.client.hget(KEYS.warm, MINE[:3])).split(b" ")) == 1 + MAX_HOLDERS


async def a_retried_job_is_remembered(scene: Scene) -> None:
    """Its conversation follows it to the worker that takes it over."""
    await _holds(scene, scene.worker, MINE)
    await scene.broker.maintenance.reclaim(scene.worker.session_id)
    heir, other = await scene.another(), await scene.another()
    assert len(await heir.claim(1)) == 1
    assert await heir.claim(7, offer=7) == await other.claim(8, offer=8) == []
    await scene.broker.jobs.enqueue(scene.job(affinity=MINE))
    assert (len(await heir.handed()), len(await other.handed())) == (1, 0)


async def the_wait_is_forgotten_with_the_queue(scene: Scene) -> None:
    """A queue that fills anew begins with a patience of its own."""
    await _two_wait(scene)
    assert len(await scene.worker.claim(2)) == 2
    assert not await scene.client.hexists(KEYS.counters, f"{WAITS_AT}:wait")


BOUND = " and takes_warm(holder, best, total, passed)"
PROOF = "proof == string.sub(digests, at + SLOT_CHARS, at + DIGEST_CHARS - 1) and held or ''"
GUARDS: list[tuple[Scenario, Rewrite]] = [
    (load_stays_within_the_bound, Rewrite("handoff", BOUND, "")),
    (
        slots_that_became_free_count,
        Rewrite("handoff", "math.max(one.slots - one.leases - one.here, one.free)", "one.free"),
    ),
    (a_lost_cache_is_cold, Rewrite("handoff", "is_holder(held, holder.cache) and ", "")),
    (half_a_cache_is_warm, Rewrite("affinity", " or has_word(held, cache.before)", "")),
    (a_cache_is_one_holder, Rewrite("affinity", "string.sub(holder, 1, #cache.name) ~= cache.name and ", "")),
    (
        a_warm_worker_takes_what_it_offers,
        Rewrite("handoff", " and call('ZSCORE', P .. 'offers:' .. key, holder.id)", ""),
    ),
    (a_slot_is_no_proof, Rewrite("affinity", PROOF, "held or ''")),
    (a_patience_ends, Rewrite("claim", " or now - tonumber(first.at) >= patience", "")),
    (within_it_the_warm_job_is_taken, Rewrite("affinity", "if is_holder(held, cache) then return i end", "")),
    (a_retry_tells_no_wait, Rewrite("claim", "if start then follow_wait", "if job then follow_wait")),
    (few_holders_are_kept, Rewrite("affinity", " and number < MAX_HOLDERS", "")),
    (a_retried_job_is_remembered, Rewrite("claim", "return fields[2] or ''", "return ''")),
    (the_wait_is_forgotten_with_the_queue, Rewrite("counters", ", ':wait', unpack(COSTS) }", ", unpack(COSTS) }")),
]


@pytest.mark.parametrize(("scenario", "without"), GUARDS, ids=[scenario.__name__ for scenario, _ in GUARDS])
async def test_a_guard_is_needed(scenario: Scenario, without: Rewrite) -> None:
    """The scenario holds with the guard, and fails without it."""
    rewritten(load_scripts(flags=False), without)  # its text is there
    await play(scenario)
    with pytest.raises((AssertionError, pytest.fail.Exception, ValueError)):
        await play(scenario, without)
