"""Entries that nobody of ours wrote, put straight into Redis: they are passed over, and everything else goes on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker import Broker
from queue_schemas import (
    Assignment,
    BadMessage,
    Control,
    ControlKind,
    JobId,
    Outcome,
    SessionId,
    Settled,
    WorkerInfo,
    new_job_id,
)
from queue_schemas.keys import MANAGER, POOLS, WORKERS, ShardKeys
from tests.support.queue import MODEL, Puller, change_record, make_job, record_of

KEYS = ShardKeys(0)
RUN = SessionId("w.0000000000000001")


async def test_control_messages_that_cannot_be_read_are_passed_over(
    broker: Broker, worker: Puller, client: Any
) -> None:
    """Unknown kinds, aborts of no job or of bytes that are none: the next message is read as ever."""
    key = KEYS.control(worker.session_id)
    for fields in (
        {"k": b"\xff\xfe"}, {"k": "abort"}, {"k": "abort", "job": b"\xff"}, {"k": "abort", "job": "all"},
        {"k": "abort", "job": "0-" + "0" * 32, "why": b"\x1b[2J\xff"}, {"\x00": b"\x00"},
    ):  # fmt: skip
        assert await client.xadd(key, fields, nomkstream=True)
    job_id = new_job_id(0)
    assert await broker.fleet.send_control(worker.session_id, Control(ControlKind.ABORT, job_id, "gone"))
    told = await worker.control_messages()
    assert [control.job_id for control in told] == ["0-" + "0" * 32, job_id]


async def test_waiting_entries_of_no_job_are_removed(broker: Broker, worker: Puller, client: Any) -> None:
    """A claim passes over entries whose job does not exist, is none or waits elsewhere, and cleans them up."""
    first, last = make_job(), make_job()
    await broker.jobs.enqueue(first)
    queue = KEYS.prefix + (await record_of(client, KEYS.job(first.id)))["queue"]
    for value in (new_job_id(0), b"\xff\x00", "", first.id, "x" * 10_000):
        await client.xadd(queue, {"id": value})
    await client.xadd(queue, {"what": "is this"})
    await broker.jobs.enqueue(last)
    assert [lease.job for lease in await worker.claim(10)] == [first, last]
    assert await client.exists(queue) == 0


async def test_a_record_in_no_state_of_ours_stops_nothing(broker: Broker, worker: Puller, client: Any) -> None:
    """Whatever a record says, the sweep ends the jobs behind it, and cancelling or deleting it is no error."""
    odd, odd_and_persisted = make_job(ttl_ms=1), make_job(ttl_ms=1, persisted=True, idempotency_key="k")
    behind = make_job(ttl_ms=2)
    for job in (odd, odd_and_persisted, behind):
        await broker.jobs.enqueue(job)
    for job in (odd, odd_and_persisted):
        await change_record(client, KEYS.job(job.id), state="melted")
    await asyncio.sleep(0.01)
    assert (await broker.maintenance.expire()).expired == 1
    assert (await record_of(client, KEYS.job(behind.id)))["state"] == "expired"
    for job in (odd, odd_and_persisted):
        assert await broker._caller.script("cancel", KEYS.budget, KEYS.prefix, job.id, "", 0, 0) == b"melted"
        await broker._caller.script("delete_persisted", KEYS.budget, KEYS.prefix, job.id, "")
    assert await worker.claim(4) == []


async def test_an_envelope_that_cannot_be_read_ends_as_a_dead_letter(
    broker: Broker, worker: Puller, client: Any
) -> None:
    """It takes nobody along, and is shown with what is wrong with it."""
    spoilt, sound = make_job(max_attempts=1), make_job()
    for job in (spoilt, sound):
        await broker.jobs.enqueue(job)
    await client.hset(KEYS.job(spoilt.id), "env", b"\xc1garbage")
    (lease,) = await worker.claim(2)
    assert lease.job == sound
    assert await broker.attempts.settle(lease, Outcome.DONE) is Settled.OK
    (letter,) = (await broker.dead_letters.page("", 10)).letters
    assert letter.job_id == spoilt.id
    assert "cannot read it" in letter.cause
    shown = await broker.dead_letters.request(letter.id)
    assert shown is not None
    assert "not a valid message" in shown.unreadable
    assert await broker.stats.depths() == {}


async def test_a_registry_with_garbage_in_it_is_read_all_the_same(broker: Broker, client: Any) -> None:
    """Names, records, pools and renewal numbers that cannot be are left out; what is right is there."""
    known = WorkerInfo(worker_id="w", session_id=RUN, assignment=Assignment(term=1, version=1))
    await broker.fleet.save_workers([known], [])
    record = known.model_dump_json()
    garbage = {
        b"\xff\xfe": record, "a\nb": record, "": record, "w-2": "{", "w-3": "[" * 10_000, "w-4": b"\xff",
        "w-5": record.replace(RUN, "no run"), "w-6": record.replace('"slots":0', '"slots":-1'),
    }  # fmt: skip
    await client.hset(WORKERS, mapping=garbage)
    assert await broker.fleet.load_workers() == {"w": known}
    await broker.known_pools.remember([MODEL])
    await client.hset(POOLS, mapping={b"\xff:x": "1", "seen:bad": "soon", "seen:\n": 2**62, "what": 2**62, "seen:": 1})
    assert (await broker.known_pools.remembered()).known == {MODEL: False}
    await broker.workers.join(RUN)
    await client.hset(KEYS.renewals, mapping={b"\xff": "1", "no run": "1", RUN[:-1] + "2": "many"})
    assert set(await broker.maintenance.renewal_counters()) == {RUN}


async def test_a_managers_lease_that_is_none_counts_as_no_manager(broker: Broker, client: Any) -> None:
    """Workers look after it all the time: what they cannot read must not end them."""
    assert await broker.fleet.leader_lease_until() == 0
    await client.hset(MANAGER, mapping={"holder": "m", "until": b"\xffsoon"})
    assert await broker.fleet.leader_lease_until() == 0
    await client.delete(MANAGER)
    assert await broker.fleet.acquire_leader_lease("m", 10_000) == 1
    assert await broker.fleet.leader_lease_until() > 0


@pytest.mark.parametrize("job_id", ["9999-" + "f" * 32, "no job id", "1-" + "0" * 32])
async def test_an_id_that_names_no_shard_of_the_queue_is_refused(broker: Broker, job_id: str) -> None:
    """[H1] A frame or a client may name any job: an id outside this queue is an error of its own, never an index out of
    range, which would end the Router that is told to cancel it."""
    for call in (
        broker.jobs.cancel(JobId(job_id), "why"),
        broker.jobs.cancel_abandoned(JobId(job_id), "why", 1),
        broker.jobs.raise_epoch(JobId(job_id), 0),
        broker.output.read(JobId(job_id)),
        broker.output.detach(JobId(job_id), RUN),
    ):
        with pytest.raises(BadMessage):
            await call
