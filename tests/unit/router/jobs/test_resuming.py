"""Resumable streams: ids on every event, resumption on any Router, a grace period for clients that left."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from queue_schemas import END, HEAD, Frame, Job, Lane, OutputPage, PersistOptions, State
from router.jobs.disconnect_grace import LATE_S, DisconnectGrace
from tests.unit.router.fakes import SSE, Answer, Client, FakeQueue, persisted_job, router
from tests.unit.router.jobs.test_routes import EVENTS, ids_of, without_ids

STREAM = {"model": "m", "messages": [], "stream": True}
RESUMABLE = {"x-inferq-resumable": "true"}


def so_far(job: Job, *pieces: bytes, over: bool = False) -> OutputPage:
    frames = []
    for seq, data in enumerate(pieces):
        flags = (HEAD if seq == 0 else 0) | (END if over and seq == len(pieces) - 1 else 0)
        frames.append(Frame(job.id, 1, "a1", seq, flags, data, *((200, SSE) if flags & HEAD else (0, ""))))
    return OutputPage(State.DONE if over else State.LEASED, 1, "a1", (1, len(frames)), tuple(frames), complete=True)


async def begun(client: Client, queue: FakeQueue, **headers: str) -> tuple[Job, Answer]:
    """A stream of which its client has two events."""
    answer = client.post(STREAM, headers=RESUMABLE | headers)
    job = await queue.job()
    queue.stream(job, *EVENTS[:2], end=False)
    queue.outputs[job.id] = so_far(job, *EVENTS[:2])
    await answer.until(lambda: answer.body.count(b"\n\n") == 2)
    return job, answer


async def test_every_event_names_its_job_and_number() -> None:
    """The job is a persisted one of the interactive lane, and not a background job."""
    queue = FakeQueue("m")
    async with router(queue, resumable_retention_ms=7_000) as app:
        job, answer = await begun(Client(app), queue)
        assert (job.persisted, job.lane, job.reply_to, job.idempotency_key) == (True, Lane.INTERACTIVE, "", "")
        keep = queue.persist_options[job.id]
        assert (keep.retention_ms, keep.background, keep.metadata.resumable) == (7_000, False, True)
        queue.stream(job, EVENTS[2], first=2)
        await answer.done()
        assert without_ids(answer.body) == b"".join(EVENTS)
        assert [given.partition("-")[2].partition(":")[2][:2] for given in ids_of(answer.body)] == ["1-", "2-", "3-"]
        assert all(given.startswith(f"{job.id}:") for given in ids_of(answer.body))
        assert queue.cancelled.empty()


@pytest.mark.parametrize("fields", [{"headers": {}}, {"headers": {"x-inferq-resumable": "false"}, "all": True}])
async def test_without_the_header_a_stream_has_no_ids(fields: dict[str, Any]) -> None:
    """An ordinary job; and a plain answer has no ids in any case."""
    queue = FakeQueue("m")
    async with router(queue, resumable_streams=fields.get("all", False)) as app:
        client = Client(app)
        answer = client.post(STREAM, headers=fields["headers"])
        job = await queue.job()
        assert not job.persisted
        queue.stream(job, *EVENTS)
        assert (await answer.done()).body == b"".join(EVENTS)
        plain = client.post({"model": "m"}, headers=RESUMABLE)
        job = await queue.job()
        assert not job.persisted
        queue.answer(job, b"{}")
        assert (await plain.done()).body == b"{}"


async def test_the_setting_makes_every_stream_resumable() -> None:
    """Without a header."""
    queue = FakeQueue("m")
    async with router(queue, resumable_streams=True) as app:
        answer = Client(app).post(STREAM)
        job = await queue.job()
        assert job.persisted
        queue.stream(job, *EVENTS)
        assert len(ids_of((await answer.done()).body)) == 3


@pytest.mark.parametrize("way", ["POST", "GET"])
async def test_a_client_that_comes_back_gets_the_rest(way: str) -> None:
    """From another Router, by the same POST or by the job's path: what follows, with ids that continue; it is one job,
    and it is not cancelled meanwhile."""
    queue, elsewhere = FakeQueue("m"), FakeQueue("m")
    async with router(queue, resume_grace_ms=60_000) as app, router(elsewhere) as other:
        client, again = Client(app), Client(other)
        job, answer = await begun(client, queue)
        client.gone.set()
        await answer.done()
        assert await queue.detached.get() == job.id
        elsewhere.persisted, elsewhere.outputs = queue.persisted, queue.outputs
        last = {"last-event-id": ids_of(answer.body)[-1]}
        if way == "POST":
            back = again.post(STREAM, headers=RESUMABLE | last)
        else:
            back = again.begin("GET", f"/v1/jobs/{job.id}/events", headers=last)
        await back.until(lambda: back.status == 200)
        elsewhere.stream(job, EVENTS[2], first=2)
        await back.done()
        assert without_ids(answer.body + back.body) == b"".join(EVENTS)
        assert ids_of(back.body)[0].startswith(f"{job.id}:3-")
        assert queue.cancelled.empty()
        assert elsewhere.enqueued.empty()


async def test_only_the_same_request_of_the_tenant_resumes_a_stream() -> None:
    """Another request, another tenant's stream, one that is not kept any more, one that differs now: each is
    refused."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        client = Client(app)
        job, answer = await begun(client, queue)
        last = ids_of(answer.body)[-1]
        other = await client.post(STREAM | {"seed": 1}, headers=RESUMABLE | {"last-event-id": last}).done()
        assert (other.status, other.error["param"]) == (400, "last-event-id")
        gone = await client.post(STREAM, headers=RESUMABLE | {"last-event-id": f"0-{'a' * 32}:1"}).done()
        assert (gone.status, gone.error["code"]) == (404, "job_not_found")
        kept = queue.persisted[job.id]
        rival = Job(**{name: getattr(job, name) for name in Job.__slots__} | {"tenant": "rival"})
        queue.persisted[job.id] = persisted_job(rival, PersistOptions(1, kept.metadata))
        foreign = await client.post(STREAM, headers=RESUMABLE | {"last-event-id": last}).done()
        assert (foreign.status, foreign.error["message"].replace(job.id, "")) == (
            404, gone.error["message"].replace(f"0-{'a' * 32}", ""),
        )  # fmt: skip
        queue.persisted[job.id] = kept
        queue.outputs[job.id] = so_far(job, b"data: another\n\n", *EVENTS[1:], over=True)
        spliced = await client.post(STREAM, headers=RESUMABLE | {"last-event-id": last}).done()
        assert (spliced.status, spliced.error["code"]) == (502, "stream_broken")


async def test_a_foreign_event_id_begins_a_new_stream() -> None:
    """Event sources send the last id of any server."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        for odd in ("17", "abc", "1-00000000"):
            answer = Client(app).post(STREAM, headers=RESUMABLE | {"last-event-id": odd})
            job = await queue.job()
            queue.stream(job, *EVENTS)
            assert without_ids((await answer.done()).body) == b"".join(EVENTS)


async def test_a_stream_without_its_client_is_cancelled_after_its_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before; and not one that is followed again by then, nor one with a key, which runs to its end."""
    monkeypatch.setattr("router.jobs.disconnect_grace.LATE_S", 0.0)
    queue = FakeQueue("m")
    async with router(queue, resume_grace_ms=200) as app:
        client = Client(app)
        job, answer = await begun(client, queue)
        begun_s = asyncio.get_running_loop().time()
        client.gone.set()
        await answer.done()
        cancelled, reason = await queue.cancellation()
        assert (cancelled, reason) == (job.id, "its client was away for more than 200 ms")
        assert asyncio.get_running_loop().time() - begun_s >= 0.2

        keyed, back = Client(app), Client(app)
        other, answer = await begun(keyed, queue, **{"idempotency-key": "k"})
        assert not queue.persist_options[other.id].metadata.resumable
        keyed.gone.set()
        await answer.done()
        left = Client(app)
        third, answer = await begun(left, queue)
        left.gone.set()
        await answer.done()
        followed = back.begin("GET", f"/v1/jobs/{third.id}/events")
        await followed.until(lambda: followed.status == 200)
        await asyncio.sleep(0.4)
        assert queue.cancelled.empty()
        assert len(app.services.disconnect_grace) == 0
        back.gone.set()
        await followed.done()
        assert (await queue.cancellation())[0] == third.id


def test_streams_are_cancelled_in_the_order_their_clients_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving again begins the grace anew; past the bound the oldest runs to its end."""
    monkeypatch.setattr("router.jobs.disconnect_grace.MAX_AWAITED", 2)
    given_up: list[str] = []
    grace = DisconnectGrace(10_000, lambda job_id, reason, after_ms: given_up.append(job_id))
    for at, job_id in enumerate("aba"):
        grace.add(job_id, at)  # type: ignore[arg-type]
    grace.sweep(11 + LATE_S)
    assert given_up == ["b"]
    grace.sweep(12 + LATE_S)
    assert given_up == ["b", "a"]
    for job_id in "cde":
        grace.add(job_id, 20)  # type: ignore[arg-type]
    grace.sweep(99)
    assert given_up[2:] == ["d", "e"]


async def test_a_client_that_returns_while_its_router_detaches_misses_nothing() -> None:
    """A detach may reach the queue after the attach that it crossed: the output is read again then."""
    queue = FakeQueue("m")
    held, taken = asyncio.Event(), asyncio.Event()

    async def detach(job_id: str, listener: str) -> None:
        taken.set()
        await held.wait()

    queue.output.detach = detach  # type: ignore[method-assign]
    async with router(queue) as app:
        client, back = Client(app), Client(app)
        job, answer = await begun(client, queue)
        client.gone.set()
        await answer.done()
        await taken.wait()
        followed = back.begin("GET", f"/v1/jobs/{job.id}/events")
        await followed.until(lambda: followed.body.count(b"\n\n") == 2)
        read = len(queue.attached)
        queue.outputs[job.id] = so_far(job, *EVENTS, over=True)  # sent to nobody: it was taken off the listeners
        held.set()
        assert without_ids((await followed.done()).body) == b"".join(EVENTS)
        assert len(queue.attached) == read + 1
