"""Background jobs over HTTP: accepted with 202, then shown, replayed, followed, cancelled and deleted."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from typing import Any

import pytest

from queue_schemas import END, HEAD, Enqueued, Frame, Job, Lane, MarkerKind, OutputPage, State
from tests.support.waiting import eventually
from tests.unit.router.fakes import SSE, Client, FakeQueue, router

PATH = "/v1/chat/completions"
CHAT = {"model": "m", "messages": []}
BACKGROUND = {"x-inferq-background": "true"}
EVENTS = (b'data: {"n":1}\n\n', b'data: {"n":2}\n\n', b"data: [DONE]\n\n")


def output(
    job: Job, *pieces: bytes, state: State = State.LEASED, kind: str = SSE, status: int = 200, cause: str = ""
) -> OutputPage:
    over = state in (State.DONE, State.FAILED)
    frames = []
    for seq, data in enumerate(pieces):
        flags = (HEAD if seq == 0 else 0) | (END if over and seq == len(pieces) - 1 else 0)
        frames.append(Frame(job.id, 1, "a1", seq, flags, data, *((status, kind) if flags & HEAD else (0, ""))))
    return OutputPage(state, 1, "a1", (1, len(frames)), tuple(frames), complete=True, cause=cause)


def ended(queue: FakeQueue, job: Job, state: State, *pieces: bytes, **fields: Any) -> None:
    """The job is over."""
    cause = fields.get("cause", "")
    queue.persisted[job.id] = replace(
        queue.persisted[job.id],
        state=state,
        started_ms=1_500,
        ended_ms=2_500,
        expires_ms=9_000,
        attempts=1,
        cause=cause,
    )
    queue.outputs[job.id] = output(job, *pieces, state=state, **fields)


async def accepted(client: Client, queue: FakeQueue, fields: Any = CHAT, **headers: str) -> Job:
    answer = await client.post(fields, headers=BACKGROUND | headers).done()
    assert answer.status == 202, answer.body
    job = await queue.job()
    assert answer.headers["location"] == f"/v1/jobs/{job.id}"
    assert answer.json()["id"] == job.id
    return job


async def get(client: Client, path: str, **headers: str) -> Any:
    return await client.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})


async def test_a_background_request_is_accepted_and_its_answer_shown() -> None:
    """202 at once, with its address; queued, then completed with the answer as JSON."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        client = Client(app)
        job = await accepted(client, queue)
        assert (job.lane, job.persisted, job.reply_to, job.ttl_ms) == (Lane.BACKGROUND, True, "", 86_400_000)
        told = (await get(client, f"/v1/jobs/{job.id}")).json()
        assert (told["object"], told["status"], told["model"], told["path"]) == ("job", "queued", "m", PATH)
        assert (told["created_at"], told["response"], told["error"], told["ended_at"]) == (1, None, None, None)
        ended(queue, job, State.DONE, b'{"a": 1}', kind="application/json")
        told = (await get(client, f"/v1/jobs/{job.id}")).json()
        assert (told["status"], told["ended_at"], told["expires_at"]) == ("completed", 2, 9)
        assert told["response"] == {
            "status_code": 200, "content_type": "application/json", "headers": {}, "body": {"a": 1},
            "encoding": "json", "too_large": False,
        }  # fmt: skip
        given = await get(client, f"/v1/jobs/{job.id}/output")
        assert (given.status, given.body, given.headers["content-type"]) == (200, b'{"a": 1}', "application/json")
        assert given.headers["x-request-id"]
        assert len(app.services.requests) == 0


@pytest.mark.parametrize("word", ["yes", "", "1"])
async def test_a_malformed_background_header_is_refused(word: str) -> None:
    """Rather than guessed."""
    async with router(FakeQueue("m")) as app:
        answer = await Client(app).post(CHAT, headers={"x-inferq-background": word}).done()
        assert (answer.status, answer.error["param"]) == (400, "x-inferq-background")


async def test_background_false_is_an_ordinary_request() -> None:
    """As without the header."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(CHAT, headers={"x-inferq-background": "false"})
        job = await queue.job()
        assert (job.persisted, job.lane) == (False, Lane.INTERACTIVE)
        queue.answer(job, b"{}")
        assert (await answer.done()).status == 200


async def test_the_same_key_is_answered_with_the_same_job() -> None:
    """Whatever its state."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        client = Client(app)
        job = await accepted(client, queue, **{"idempotency-key": "k"})
        ended(queue, job, State.DONE, b"{}", kind="application/json")
        queue.holder = Enqueued(job.id, State.DONE)
        again = await client.post(CHAT, headers=BACKGROUND | {"idempotency-key": "k"}).done()
        assert (again.status, again.json()["id"], again.json()["status"]) == (202, job.id, "completed")


@pytest.mark.parametrize(
    ("state", "status", "code"),
    [
        (State.DEAD, "failed", "attempts_exhausted"),
        (State.CANCELLED, "cancelled", "cancelled"),
        (State.EXPIRED, "expired", "deadline_exceeded"),
    ],
)
async def test_a_job_without_an_answer_shows_its_error(state: State, status: str, code: str) -> None:
    """In the object, as the error that its request would have got, and as the last event."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        client = Client(app)
        job = await accepted(client, queue, CHAT | {"stream": True})
        ended(queue, job, state, cause="of something")
        told = (await get(client, f"/v1/jobs/{job.id}")).json()
        assert (told["status"], told["error"]["code"], told["response"]) == (status, code, None)
        assert "of something" in told["error"]["message"]
        given = await get(client, f"/v1/jobs/{job.id}/output")
        assert given.status >= 400
        assert given.error["code"] == code
        events = await get(client, f"/v1/jobs/{job.id}/events")
        assert (events.status, events.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert code.encode() in events.body
        ended(queue, job, state, EVENTS[0], cause="of something")
        events = await get(client, f"/v1/jobs/{job.id}/events")
        assert events.body.startswith(b'data: {"n":1}\nid: 1-')
        assert events.body.count(b"\n\n") == 2
        assert code.encode() in events.body


def without_ids(body: bytes) -> bytes:
    return b"".join(line for line in body.splitlines(keepends=True) if not line.startswith(b"id: "))


def ids_of(body: bytes) -> list[str]:
    return [line[4:].strip().decode() for line in body.splitlines() if line.startswith(b"id: ")]


async def test_events_can_be_resumed_behind_any() -> None:
    """By header or query, by id or number; the header goes first. All of them together are the persisted answer."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        client = Client(app)
        job = await accepted(client, queue, CHAT | {"stream": True})
        ended(queue, job, State.DONE, *EVENTS)
        path = f"/v1/jobs/{job.id}/events"
        whole = await get(client, path)
        assert without_ids(whole.body) == b"".join(EVENTS)
        assert [given.partition("-")[0] for given in ids_of(whole.body)] == ["1", "2", "3"]
        for number, given in enumerate(ids_of(whole.body), 1):
            rest = b"".join(EVENTS[number:])
            for answer in (
                await get(client, path, last_event_id=given),
                await get(client, path, last_event_id=str(number)),
                await get(client, f"{path}?starting_after={given}"),
                await get(client, f"{path}?starting_after=9", last_event_id=f"{job.id}:{given}"),
            ):
                assert (answer.status, without_ids(answer.body)) == (200, rest)
        full = await get(client, path, last_event_id=f"{job.id}:1")
        assert all(given.startswith(f"{job.id}:") for given in ids_of(full.body))
        shown = (await get(client, f"/v1/jobs/{job.id}")).json()["response"]
        assert (shown["body"].encode(), shown["encoding"]) == (b"".join(EVENTS), "text")


async def test_a_position_that_cannot_be_resumed_is_refused() -> None:
    """A malformed id, another job's, one of a stream that differed, one past its end."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        client = Client(app)
        job = await accepted(client, queue, CHAT | {"stream": True})
        ended(queue, job, State.DONE, *EVENTS)
        path = f"/v1/jobs/{job.id}/events"
        for odd in ("x", "1-2", f"0-{'a' * 32}:1"):
            answer = await get(client, path, last_event_id=odd)
            assert (answer.status, answer.error["param"]) == (400, "last-event-id")
        assert (await get(client, f"{path}?starting_after=-1")).error["param"] == "starting_after"
        for wrong in ("2-00000000", "4"):
            answer = await get(client, path, last_event_id=wrong)
            assert (answer.status, answer.error["code"]) == (502, "stream_broken")


async def test_a_live_job_is_followed_to_its_end() -> None:
    """Persisted output, then live; comments while it is silent; and when its client leaves, it runs on."""
    queue = FakeQueue("m")
    async with router(queue, keepalive_interval_ms=50) as app:
        client = Client(app)
        job = await accepted(client, queue, CHAT | {"stream": True})
        queue.outputs[job.id] = output(job, EVENTS[0])
        following = client.begin("GET", f"/v1/jobs/{job.id}/events")
        await following.until(lambda: b'"n":1' in following.body)
        await following.until(lambda: b": queued\n" in following.body)
        queue.stream(job, *EVENTS[1:], first=1)
        assert without_ids((await following.done()).body.replace(b": queued\n", b"")) == b"".join(EVENTS)
        leaver = Client(app)
        left = leaver.begin("GET", f"/v1/jobs/{job.id}/events")
        await left.until(lambda: b'"n":1' in left.body)
        leaver.gone.set()
        await left.done()
        async with asyncio.timeout(5):
            assert await queue.detached.get() == job.id
        assert queue.cancelled.empty()


async def test_a_plain_job_is_one_event() -> None:
    """At its end, comments before; an answer that is no text is refused with the way to it."""
    queue = FakeQueue("m")
    async with router(queue, keepalive_interval_ms=50) as app:
        client = Client(app)
        job = await accepted(client, queue)
        queue.outputs[job.id] = output(job)
        following = client.begin("GET", f"/v1/jobs/{job.id}/events")
        await following.until(lambda: b": queued\n" in following.body)
        queue.answer(job, b'{"a":1}')
        body = (await following.done()).body.replace(b": queued\n", b"")
        assert without_ids(body) == b'data: {"a":1}\n\n'
        ended(queue, job, State.DONE, b'{"a":1}', kind="application/json")
        last = ids_of(body)[0]
        assert (await get(client, f"/v1/jobs/{job.id}/events", last_event_id=last)).body == b""
        ended(queue, job, State.DONE, b"\xff\x00", kind="audio/wav")
        refused = await get(client, f"/v1/jobs/{job.id}/events")
        assert (refused.status, "/output" in refused.error["message"]) == (400, True)
        shown = (await get(client, f"/v1/jobs/{job.id}")).json()["response"]
        assert (shown["body"], shown["encoding"]) == ("/wA=", "base64")


async def test_a_large_answer_is_not_shown_in_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read at /output."""
    monkeypatch.setattr("router.jobs.service.MAX_SHOWN_BYTES", 100)
    queue = FakeQueue("m")
    async with router(queue) as app:
        client = Client(app)
        job = await accepted(client, queue)
        large = b'"' + b"x" * 200 + b'"'
        ended(queue, job, State.DONE, large, kind="application/json")
        shown = (await get(client, f"/v1/jobs/{job.id}")).json()["response"]
        assert (shown["body"], shown["too_large"], shown["status_code"]) == (None, True, 200)
        assert (await get(client, f"/v1/jobs/{job.id}/output")).body == large


async def test_jobs_are_listed_in_pages_and_by_status() -> None:
    """With the ids of the next page."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        client = Client(app)
        jobs = [await accepted(client, queue) for _ in range(3)]
        ended(queue, jobs[1], State.FAILED, b"{}", kind="application/json", status=400)
        page = (await get(client, "/v1/jobs?limit=2")).json()
        assert [job["id"] for job in page["data"]] == [job.id for job in jobs[:2]]
        assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == (
            "list", jobs[0].id, jobs[1].id, True,
        )  # fmt: skip
        page = (await get(client, f"/v1/jobs?limit=2&after={page['last_id']}")).json()
        assert ([job["id"] for job in page["data"]], page["has_more"]) == ([jobs[2].id], False)
        page = (await get(client, "/v1/jobs?status=failed")).json()
        assert [job["id"] for job in page["data"]] == [jobs[1].id]
        for odd in ("limit=0", "limit=101", "status=done", "limit=x"):
            assert (await get(client, f"/v1/jobs?{odd}")).status == 400


async def test_jobs_are_visible_to_their_tenant_only() -> None:
    """Another tenant, or a caller without a key, gets the same error as for an unknown job on every path."""
    keys = ",".join(f"{hashlib.sha256(name.encode()).hexdigest()}:{name}" for name in ("acme", "rival"))
    queue = FakeQueue("m")
    async with router(queue, api_keys=keys) as app:
        client = Client(app)
        job = await accepted(client, queue, authorization="Bearer acme")
        never = "0-" + "a" * 32
        for method, tail in (("GET", ""), ("GET", "/output"), ("GET", "/events"), ("POST", "/cancel"), ("DELETE", "")):
            answers = []
            for job_id in (job.id, never):
                path = f"/v1/jobs/{job_id}{tail}"
                answer = await client.request(method, path, headers={"authorization": "Bearer rival"})
                assert (answer.status, answer.error["code"]) == (404, "job_not_found")
                answers.append(answer.body.replace(job_id.encode(), b"ID"))
                assert (await client.request(method, path)).status == 401
            assert answers[0] == answers[1]
        assert (await get(client, "/v1/jobs", authorization="Bearer rival")).json()["data"] == []
        assert len((await get(client, "/v1/jobs", authorization="Bearer acme")).json()["data"]) == 1
        for odd in ("x", "..", "%2e%2e", "0-" + "A" * 32, "9999-" + "a" * 32):
            assert (await get(client, f"/v1/jobs/{odd}", authorization="Bearer acme")).status == 404


async def test_a_job_is_cancelled_and_deleted_on_demand() -> None:
    """The response says so."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        client = Client(app)
        job = await accepted(client, queue)
        assert (await client.request("POST", f"/v1/jobs/{job.id}/cancel")).json()["id"] == job.id
        assert (await queue.cancellation())[0] == job.id
        gone = await client.request("DELETE", f"/v1/jobs/{job.id}")
        assert gone.json() == {"id": job.id, "object": "job", "deleted": True}
        assert (await client.request("DELETE", f"/v1/jobs/{job.id}")).status == 404


async def test_a_follower_that_reads_nothing_is_cut_off() -> None:
    """After the same time as any client; the job runs on."""
    queue = FakeQueue("m")
    async with router(queue, client_stall_timeout_ms=100) as app:
        client = Client(app)
        job = await accepted(client, queue, CHAT | {"stream": True})
        queue.outputs[job.id] = output(job, EVENTS[0])
        client.reading.clear()
        stuck = client.begin("GET", f"/v1/jobs/{job.id}/events")
        await eventually(stuck.task.done, "it is cut off")
        await asyncio.gather(stuck.task, return_exceptions=True)
        assert len(app.services.requests) == 0
        queue.mark(job, MarkerKind.REQUEUED, epoch=2)
        assert queue.cancelled.empty()


@pytest.mark.parametrize(
    ("more", "headers", "yields"),
    [
        ({"stop_token_ids": [10**18]}, {}, 0),
        ({}, {}, 3),
        ({"stream": True}, {}, 3),
        ({"stream": True}, {"x-inferq-on-loss": "restart"}, 0),
        ({"tools": [{"type": "function"}]}, {}, 0),
        ({"stream": True, "logprobs": True}, {}, 0),
    ],
)
async def test_background_requests_may_yield(more: dict[str, Any], headers: dict[str, str], yields: int) -> None:
    """As often as the setting says, if their answer can go on behind a part of it; interactive ones never."""
    queue, chat = FakeQueue("m"), {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | more
    async with router(queue, max_yields=3) as app:
        assert (await accepted(Client(app), queue, chat, **headers)).yields == yields
        answer = Client(app).post(chat)
        job = await queue.job()
        assert job.yields == 0
        queue.answer(job, b"{}")
        await answer.done()


async def test_a_background_request_that_may_not_wait_is_refused() -> None:
    """It would be queued without a word; the error says what to leave out."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        headers = {"x-inferq-background": "true", "x-inferq-do-not-queue": "true"}
        answer = await Client(app).post({"model": "m", "messages": []}, headers=headers).done()
    assert answer.status == 400
    assert b"x-inferq-do-not-queue" in answer.body
