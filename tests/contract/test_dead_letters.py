"""Dead letters: listed, read, removed."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from broker import Broker
from queue_schemas import BadRequest, Job
from queue_schemas.keys import ShardKeys
from tests.support.queue import MODEL, Puller, ServerBackend, make_job

KEYS = ShardKeys(0)


async def declare_dead(broker: Broker, worker: Puller, n: int, **fields: Any) -> list[Job]:
    """Jobs that end as dead letters."""
    jobs = [make_job(max_attempts=1, **fields) for _ in range(n)]
    for job in jobs:
        await broker.jobs.enqueue(job)
        await broker.attempts.release(await worker.claim_one(), "the engine failed: \u00fc", counted=True)
    return jobs


async def test_a_letter_tells_what_happened_and_what_was_asked(broker: Broker, worker: Puller) -> None:
    """Names are those that people know, the body is the client's own bytes."""
    (job,) = await declare_dead(
        broker, worker, 1, tenant="a:b \u00fc", body=b"\x00\xff", path="/v1/embeddings", request_id="req_1"
    )
    (letter,) = (await broker.dead_letters.page("", 10)).letters
    assert (letter.job_id, letter.model, letter.tenant) == (job.id, MODEL, "a:b \u00fc")
    assert (letter.cause, letter.worker, letter.attempts) == ("the engine failed: \u00fc", worker.session_id, 1)
    found = await broker.dead_letters.request(letter.id)
    assert found is not None
    assert (found.path, found.request_id, base64.b64decode(found.body_base64)) == (
        "/v1/embeddings",
        "req_1",
        b"\x00\xff",
    )


async def test_pages_cover_all_letters_once(broker: Broker, worker: Puller) -> None:
    """In order, whatever their size."""
    jobs = await declare_dead(broker, worker, 7)
    seen, after = [], ""
    for _ in range(4):
        page = await broker.dead_letters.page(after, 3)
        seen += [letter.job_id for letter in page.letters]
        after = page.next
        if not after:
            break
    assert seen == [job.id for job in jobs]


async def test_a_list_leaves_the_requests_where_they_are(real_backend: ServerBackend) -> None:
    """They may be many megabytes each, and travel on the connection that all requests use."""
    broker, client = await real_backend.connect(), real_backend.client()
    jobs = await declare_dead(broker, await Puller(broker).join(), 5, body=b"x" * (5 << 20))
    before = (await client.info("stats"))["total_net_output_bytes"]
    page = await broker.dead_letters.page("", 4)
    rest = await broker.dead_letters.page(page.next, 4)
    after = (await client.info("stats"))["total_net_output_bytes"]
    await broker.close()
    await client.aclose()
    assert [letter.job_id for letter in page.letters + rest.letters] == [job.id for job in jobs]
    assert rest.next == ""
    assert after - before < 1 << 20


async def test_removed_letters_give_their_bytes_back_once(broker: Broker, worker: Puller, client: Any) -> None:
    """What is gone already counts for nothing."""
    await declare_dead(broker, worker, 3)
    ids = [letter.id for letter in (await broker.dead_letters.page("", 10)).letters]
    assert await broker.dead_letters.forget(ids[:2]) == 2
    assert await broker.dead_letters.forget(ids) == 1
    assert await broker.dead_letters.request(ids[0]) is None
    assert not await client.hexists(KEYS.budget, "dead:bytes")
    assert (await broker.dead_letters.page("", 10)).letters == []


async def test_letters_that_somebody_deleted_leave_nothing_for_ever(
    broker: Broker, worker: Puller, client: Any
) -> None:
    """With their stream gone nothing leads to their requests: those expire, and their bytes count no more."""
    await declare_dead(broker, worker, 3)
    requests = [KEYS.dead_request(entry.decode()) for entry, _ in await client.xrange(KEYS.dead)]
    await client.delete(KEYS.dead)
    await broker.maintenance.expire()
    assert not await client.hexists(KEYS.budget, "dead:bytes")
    week_ms = 7 * 24 * 3600 * 1000
    assert all([week_ms < await client.pttl(request) < 2 * week_ms for request in requests])


async def test_a_letter_that_cannot_be_read_is_shown_all_the_same(broker: Broker, worker: Puller, client: Any) -> None:
    """Of another version, say: it is named, and says why."""
    await declare_dead(broker, worker, 1)
    ((entry, _),) = await client.xrange(KEYS.dead)
    await client.set(KEYS.dead_request(entry.decode()), b"\x81\xa1v\x09")
    (letter,) = (await broker.dead_letters.page("", 10)).letters
    found = await broker.dead_letters.request(letter.id)
    assert found is not None
    assert "version 9" in found.unreadable


@pytest.mark.parametrize(
    "wrong", ["", "x", "0:1", "0:1-1-1", "99999:1-1", "0:1-1\r\nX", "0:18446744073709551616-0", "0:\u0661-1"]
)
async def test_what_is_no_id_is_refused(broker: Broker, wrong: str) -> None:
    """With a sentence, before the server sees it: a script that met it halfway would leave its work half done."""
    with pytest.raises(BadRequest):
        await broker.dead_letters.request(wrong)
    with pytest.raises(BadRequest):
        await broker.dead_letters.forget(["0:1-1", wrong])


async def test_a_shard_that_does_not_exist_has_no_letters(broker: Broker) -> None:
    """Nobody is asked."""
    assert await broker.dead_letters.request("7:1-1") is None
    assert await broker.dead_letters.forget(["7:1-1"]) == 0
