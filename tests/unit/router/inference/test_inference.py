"""The hot path, over a queue in memory: what a client sent and what it got."""

from __future__ import annotations

import asyncio
import hashlib

import orjson
import pytest

from broker import JobStatus
from queue_schemas import BrokerFull, JobId, MarkerKind, OverCapacity, State
from scheduling.cost import OUTPUT_WEIGHT
from tests.support.waiting import eventually
from tests.unit.router.fakes import Client, FakeQueue, PersistedStream, router, worker

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
STREAM = CHAT | {"stream": True}
DONE = b"data: [DONE]\n\n"


def chunk(text: str, ident: str = "one") -> bytes:
    body = {"id": ident, "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}]}
    return b"data: " + orjson.dumps(body) + b"\n\n"


async def test_a_plain_request_is_queued_and_answered() -> None:
    """The body reaches the queue untouched, and the engine's answer the client, with its length and the request id."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        raw = b' {"model": "m", "x": 1.0e5 , "priority": -20}'
        answer = Client(app).post(raw, headers={"x-request-id": "mine-1", "content-type": "application/json; a=b"})
        job = await queue.job()
        queue.answer(job, b'{"ok": true}')
        await answer.done()
    assert (job.body, job.content_type, job.path) == (raw, "application/json; a=b", "/v1/chat/completions")
    assert (job.model, job.tenant, job.stream, job.band, job.request_id) == ("m", "default", False, 0, "mine-1")
    assert job.reply_to == app.services.link.session_id
    assert (answer.status, answer.body, answer.complete) == (200, b'{"ok": true}', True)
    assert answer.headers == {"content-type": "application/json", "content-length": "12", "x-request-id": "mine-1"}
    assert queue.cancelled.empty()
    assert len(app.services.requests) == 0


@pytest.mark.parametrize(("near", "remote_after_ms"), [(True, 700), (False, 0)])
async def test_a_request_is_of_its_routers_region(near: bool, remote_after_ms: int) -> None:
    """Workers of the region go first for as long as the settings say; where there is none, nobody is waited for."""
    queue = FakeQueue("m")
    queue.workers = {"w1": worker("m").model_copy(update={"region": "eu" if near else "us"})}
    async with router(queue, region="eu", region_remote_after_ms=700) as app:
        answer = Client(app).post(CHAT)
        job = await queue.job()
        queue.answer(job, b"{}")
        await answer.done()
    assert (job.region, job.remote_after_ms) == ("eu", remote_after_ms)


async def test_a_router_without_a_region_sets_no_remote_delay() -> None:
    """Its jobs name no region, wherever the workers are."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(CHAT)
        job = await queue.job()
        queue.answer(job, b"{}")
        await answer.done()
    assert (job.region, job.remote_after_ms) == ("", 0)


async def test_an_engine_error_passes_as_it_is() -> None:
    """A status of the engine is the client's status, plain or streamed."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        for fields in (CHAT, STREAM):
            answer = Client(app).post(fields)
            queue.answer(await queue.job(), b'{"error": "too long"}', status=400)
            await answer.done()
            assert (answer.status, answer.body) == (400, b'{"error": "too long"}')
            assert answer.headers["content-length"] == "21"


async def test_a_stream_is_sent_as_it_comes() -> None:
    """Pieces pass at once with the headers that keep proxies from buffering, and frames of a flush share one send."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(STREAM)
        job = await queue.job()
        assert job.stream
        queue.stream(job, chunk("a"), end=False)
        await answer.until(lambda: answer.body == chunk("a"))
        queue.stream(job, chunk("b"), chunk("c"), DONE, first=1)
        await answer.done()
    assert answer.body == chunk("a") + chunk("b") + chunk("c") + DONE
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"


async def test_many_requests_get_their_own_answers() -> None:
    """Answers that come in another order than the requests are not mixed up."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answers = [Client(app).post(CHAT | {"n": n}) for n in range(50)]
        jobs = [await queue.job() for _ in answers]
        for job in reversed(jobs):
            queue.answer(job, orjson.dumps(orjson.loads(job.body)["n"]))
        for n, answer in enumerate(answers):
            assert (await answer.done()).json() == n


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b'{"model": ', None, "line 1, column 11, byte 10"),
        (b"", None, "empty"),
        (b"[1]", None, "an array"),
        (b"null", None, "null"),
        (b"{}", "model", "missing"),
        (b'{"model": 3}', "model", "a number"),
        (b'{"model": ""}', "model", "1 to 256"),
        (b'{"model": "m", "stream": "yes"}', "stream", "true or false"),
        (b'{"model": "m", "priority": true}', "priority", "whole number"),
        (b'{"model": "m", "timeout": "30"}', "timeout", "a number of seconds above 0"),
        (b'{"model": "m", "timeout": true}', "timeout", "a number of seconds above 0"),
        (b'{"model": "m", "timeout": [30]}', "timeout", "a number of seconds above 0"),
        (b'{"model": "m", "timeout": 0}', "timeout", "a number of seconds above 0"),
        (b'{"model": "m", "timeout": -1.5}', "timeout", "a number of seconds above 0"),
        (b"\xff\xfe", None, "not valid JSON"),
    ],
)
async def test_a_wrong_body_is_refused_precisely(body: bytes, param: str | None, words: str) -> None:
    """The error names the field, or the position in the text; nothing is queued."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = await Client(app).post(body).done()
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["param"] == param
    assert words in answer.error["message"]
    assert set(answer.error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"].startswith("req_")
    assert queue.enqueued.empty()


async def test_an_unknown_model_is_not_found() -> None:
    """The answer names the models there are; one that joined just now is found at once."""
    queue = FakeQueue("m")
    async with router(queue, directory_interval_ms=60_000) as app:
        answer = await Client(app).post({"model": "nope"}).done()
        assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
        assert "known are: m" in answer.error["message"]
        queue.workers = {"w1": worker("m", "late")}
        late = Client(app).post({"model": "late"})
        queue.answer(await queue.job(), b"1")
        assert (await late.done()).status == 200


async def test_a_model_without_a_worker_waits_until_its_deadline() -> None:
    """A request for a known model at zero workers is queued, and its deadline's error says that no worker serves it."""
    queue = FakeQueue()
    async with router(queue, pools=["m"]) as app:
        answer = Client(app).post(CHAT, headers={"x-inferq-deadline-ms": "700"})
        job = await queue.job()
        assert job.ttl_ms == 700
        queue.mark(job, MarkerKind.EXPIRED, reason="its time ran out in the queue")
        await answer.done()
    assert (answer.status, answer.error["code"]) == (504, "deadline_exceeded")
    assert "no worker serves m" in answer.error["message"]


async def test_a_timeout_in_the_body_is_the_requests_deadline() -> None:
    """``timeout`` (seconds, in JSON or a form) bounds the request; the header wins, and the body travels as it came."""
    queue = FakeQueue("m")
    bodies = [b'{"model":"m", "timeout": 1.25}', b'{"model":"m","timeout":90000}', b'{"model":"m","timeout":null}']
    form = b"".join(
        b'--B\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % field
        for field in ((b"model", b"m"), (b"timeout", b"2.5"))
    )
    async with router(queue, default_deadline_ms=7_000, max_deadline_ms=9_000) as app:
        answers = [Client(app).post(body) for body in bodies]
        answers.append(Client(app).post(bodies[0], headers={"x-inferq-deadline-ms": "600"}))
        kind = {"content-type": "multipart/form-data; boundary=B"}
        answers.append(Client(app).post(form + b"--B--", "/v1/audio/transcriptions", kind))
        jobs = [await queue.job() for _ in answers]
        for job, answer in zip(jobs, answers, strict=True):
            queue.answer(job, b"{}")
            await answer.done()
    assert [job.ttl_ms for job in jobs] == [1_250, 9_000, 7_000, 600, 2_500]
    assert [job.body for job in jobs[:3]] == bodies


async def test_cancelled_jobs_are_counted_by_reason() -> None:
    """Clients that left and requests that the Router abandoned have different labels."""
    queue = FakeQueue("m")
    async with router(queue, deadline_grace_ms=20) as app:
        client = Client(app)
        left = client.post(CHAT)
        await queue.job()
        client.gone.set()
        await left.done()
        late = await Client(app).post(CHAT | {"timeout": 0.03}).done()
        text = (await Client(app).request("GET", "/metrics")).body.decode()
    assert late.status == 504
    assert 'inferq_jobs_cancelled_total{reason="client_left"} 1.0' in text
    assert 'inferq_jobs_cancelled_total{reason="abandoned"} 1.0' in text


async def test_a_silent_queue_is_a_missed_deadline_and_a_cancelled_job() -> None:
    """With Redis gone for good, a waiting request ends a grace after its deadline."""
    queue = FakeQueue("m")
    async with router(queue, deadline_grace_ms=20) as app:
        answer = await Client(app).post(CHAT, headers={"x-inferq-deadline-ms": "30"}).done()
        job = await queue.job()
        assert await queue.cancellation() == (job.id, "its Router abandoned it")
    assert answer.status == 504


async def test_an_enqueue_that_hangs_ends_at_the_deadline() -> None:
    """A request that cannot even be queued in time does not wait longer than it asked for."""
    queue = FakeQueue("m")
    queue.hold_enqueue = True
    async with router(queue) as app:
        answer = await Client(app).post(CHAT, headers={"x-inferq-deadline-ms": "30"}).done()
    assert answer.status == 504
    assert "while Redis did not answer" in answer.error["message"]


async def test_no_worker_is_refused_where_the_setting_says_so() -> None:
    """With on_no_worker = refuse a known model without a worker answers 503 at once."""
    queue = FakeQueue()
    async with router(queue, pools=["m"], on_no_worker="refuse") as app:
        answer = await Client(app).post(CHAT).done()
    assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "no_worker", "5")
    assert queue.enqueued.empty()


async def test_markers_are_answered_with_their_errors() -> None:
    """A dead letter is 502, an expired job 504, each with a code."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        for kind, status, code in (
            (MarkerKind.DEAD, 502, "attempts_exhausted"),
            (MarkerKind.EXPIRED, 504, "deadline_exceeded"),
            (MarkerKind.CANCELLED, 499, "cancelled"),
        ):
            answer = Client(app).post(CHAT)
            queue.mark(await queue.job(), kind, reason="so it is")
            await answer.done()
            assert (answer.status, answer.error["code"]) == (status, code)
        assert queue.cancelled.empty()


@pytest.mark.parametrize(
    ("refusal", "status"),
    [(OverCapacity("too much", retry_after_s=7), 429), (BrokerFull("full", retry_after_s=7), 503)],
)
async def test_a_refused_enqueue_says_when_to_retry(refusal: OverCapacity | BrokerFull, status: int) -> None:
    """A used-up budget or a full Redis is answered with Retry-After, and nothing is cancelled that never was."""
    queue = FakeQueue("m")
    queue.refusal = refusal
    async with router(queue) as app:
        answer = await Client(app).post(CHAT).done()
    assert (answer.status, answer.headers["retry-after"]) == (status, "7")
    assert queue.cancelled.empty()


async def test_a_client_that_leaves_cancels_its_job() -> None:
    """Disconnecting while waiting, or in the middle of a stream, cancels the job once."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        for pieces in ((), (chunk("a"),)):
            client = Client(app)
            answer = client.post(STREAM)
            job = await queue.job()
            if pieces:
                queue.stream(job, *pieces, end=False)
                await answer.until(lambda answer=answer: answer.body != b"")
            client.gone.set()
            await answer.done()
            assert await queue.cancellation() == (job.id, "its client went away")
            assert queue.used[job.id] == OUTPUT_WEIGHT * len(pieces)
        assert queue.cancelled.empty()
        assert len(app.services.requests) == 0


async def test_a_client_that_leaves_while_its_job_is_queued_cancels_it() -> None:
    """A disconnect is noticed even while the queue does not answer."""
    queue = FakeQueue("m")
    queue.hold_enqueue = True
    async with router(queue) as app:
        client = Client(app)
        answer = client.post(CHAT)
        await asyncio.sleep(0)
        client.gone.set()
        await answer.done()
        assert (await queue.cancellation())[1] == "its client went away"


async def test_a_silent_stream_is_kept_alive_with_comments() -> None:
    """After the interval the answer begins with 200 and comments; the engine's stream follows, without another head."""
    queue = FakeQueue("m")
    async with router(queue, keepalive_interval_ms=50) as app:
        answer = Client(app).post(STREAM)
        job = await queue.job()
        await answer.until(lambda: answer.body.count(b": queued\n") >= 2)
        assert answer.status == 200
        queue.stream(job, chunk("a"), DONE)
        await answer.done()
    assert answer.body.replace(b": queued\n", b"") == chunk("a") + DONE
    assert answer.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("resumable", ["false", "true"])
async def test_a_stream_that_waits_for_a_worker_says_so(resumable: str) -> None:
    """[C9] Its comments name the model that nobody serves, and stop to once somebody does."""
    queue = FakeQueue("m")
    waiting = b": waiting for a worker that serves idle\n"
    async with router(queue, keepalive_interval_ms=50, pools=["idle"]) as app:
        answer = Client(app).post(STREAM | {"model": "idle"}, headers={"x-inferq-resumable": resumable})
        stream = PersistedStream(queue, await queue.job())
        await answer.until(lambda: answer.body.count(waiting) >= 2)
        queue.workers = {"w1": worker("m", "idle")}
        await answer.until(lambda: b": queued\n" in answer.body)
        stream.say(chunk("a"), DONE, end=True)
        await answer.done()
    assert answer.status == 200


async def test_an_error_after_comments_is_an_event() -> None:
    """A stream that has begun ends with its error as an event: an error of ours, or the engine's."""
    queue = FakeQueue("m")
    async with router(queue, keepalive_interval_ms=50) as app:
        for engine in (False, True):
            answer = Client(app).post(STREAM)
            job = await queue.job()
            await answer.until(lambda answer=answer: answer.status == 200)
            if engine:
                queue.answer(job, b'{"error":\n {"message": "no", "type": "t", "param": null, "code": 1}}', status=400)
            else:
                queue.mark(job, MarkerKind.DEAD, reason="gone")
            await answer.done()
            assert answer.complete
            event = answer.body.replace(b": queued\n", b"")
            assert event.endswith(b"\n\n")
            lines = event.splitlines()[:-1]
            assert all(line.startswith(b"data: ") for line in lines)
            data = b"".join(line.removeprefix(b"data: ") for line in lines)
            assert set(orjson.loads(data)["error"]) == {"message", "type", "param", "code"}


async def test_a_plain_answer_is_not_begun_early() -> None:
    """Comments are for streams: a plain answer begins when its status is known."""
    queue = FakeQueue("m")
    async with router(queue, keepalive_interval_ms=50, deadline_grace_ms=0) as app:
        answer = await Client(app).post(CHAT, headers={"x-inferq-deadline-ms": "150"}).done()
    assert answer.status == 504


async def test_a_lost_worker_in_the_middle_of_a_stream_is_not_seen() -> None:
    """The second attempt is compared, and the client's stream continues without a repeat."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(STREAM)
        job = await queue.job()
        queue.stream(job, chunk("Hel"), end=False)
        queue.mark(job, MarkerKind.REQUEUED, epoch=2)
        queue.stream(job, chunk("Hello", "two"), chunk("!", "two"), DONE, epoch=2)
        await answer.done()
    assert b"".join(answer.body.split()).count(b'"one"') == 3
    texts = [orjson.loads(e[6:])["choices"][0]["delta"]["content"] for e in answer.body.split(b"\n\n")[:-2]]
    assert texts == ["Hel", "lo", "!"]


async def test_a_stream_that_cannot_continue_ends_with_an_error_and_cancels_the_job() -> None:
    """Text that differs ends the stream with the event stream_broken; the attempt still running is cancelled."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(STREAM)
        job = await queue.job()
        queue.stream(job, chunk("Hel"), end=False)
        await answer.until(lambda: answer.body != b"")
        queue.mark(job, MarkerKind.REQUEUED, epoch=2)
        queue.stream(job, chunk("Bye", "two"), end=False, epoch=2)
        await answer.done()
        assert (await queue.cancellation())[0] == job.id
    assert answer.body.startswith(chunk("Hel"))
    assert b'"stream_broken"' in answer.body
    assert answer.complete


async def test_a_lost_frame_makes_the_request_run_again() -> None:
    """A gap in the frames is closed by a new job; the old one is cancelled and its frames no longer count."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(STREAM)
        job = await queue.job()
        queue.stream(job, chunk("Hel"), end=False)
        queue.stream(job, chunk("x"), end=False, first=2)
        again = await queue.job()
        assert again.id != job.id
        assert again.body == job.body
        assert (await queue.cancellation())[0] == job.id
        queue.stream(job, chunk("lost"), end=False, first=1)
        queue.stream(again, chunk("Hello"), DONE)
        await answer.done()
    assert answer.body == chunk("Hel") + chunk("lo") + DONE


async def test_a_lost_reply_stream_enqueues_its_jobs_again() -> None:
    """A job without any frame yet is enqueued again under its own id, which has no second effect."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(CHAT)
        job = await queue.job()
        queue.lose_replies()
        assert (await queue.job()).id == job.id
        queue.answer(job, b"1", epoch=2)
        assert (await answer.done()).body == b"1"


async def test_a_finished_job_whose_answer_was_lost_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under another id."""
    monkeypatch.setattr("router.inference.relay.RESUBMIT_AFTER_S", 0.05)
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(CHAT)
        job = await queue.job()
        queue.state = State.DONE
        queue.lose_replies()
        assert (await queue.job()).id == job.id
        queue.state = State.QUEUED
        again = await queue.job()
        assert again.id != job.id
        queue.answer(again, b"2")
        assert (await answer.done()).body == b"2"


async def test_resubmissions_are_limited() -> None:
    """Past the limit the error says to send the request again."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(STREAM)
        for _ in range(4):
            queue.stream(await queue.job(), chunk("x"), end=False, first=1)
        await answer.done()
    assert (answer.status, answer.error["code"]) == (502, "engine_failed")


async def test_a_slow_reader_loses_its_job() -> None:
    """A client that lets more than its buffer accumulate is cut off, and its job is cancelled."""
    queue = FakeQueue("m")
    async with router(queue, max_client_buffer_bytes=16 * 1024) as app:
        client = Client(app)
        answer = client.post(STREAM)
        job = await queue.job()
        client.reading.clear()
        queue.stream(job, chunk("x"), end=False)
        for _ in range(3):
            await asyncio.sleep(0)
        queue.stream(job, chunk("y" * 20_000), end=False, first=1)
        with pytest.raises(asyncio.CancelledError):
            await answer.done()
        assert (await queue.cancellation())[0] == job.id


async def test_a_client_that_stalls_loses_its_job() -> None:
    """A client that reads nothing for too long is cut off even if little waits for it."""
    queue = FakeQueue("m")
    async with router(queue, client_stall_timeout_ms=100) as app:
        client = Client(app)
        answer = client.post(STREAM)
        job = await queue.job()
        client.reading.clear()
        queue.stream(job, chunk("x"), end=False)
        with pytest.raises(asyncio.CancelledError):
            await answer.done()
        assert (await queue.cancellation())[0] == job.id


async def test_a_body_too_large_is_refused_before_it_is_read() -> None:
    """An announced size is refused at once, an unannounced one as soon as it passes the limit, and the connection
    ends after the refusal was read."""
    queue = FakeQueue("m")
    async with router(queue, max_body_bytes=2048) as app:
        announced = Client(app).begin("POST", "/v1/completions", [b"x"] * 3, {"content-length": "4096"})
        await announced.done()
        crept = Client(app).begin("POST", "/v1/completions", [b"x" * 1024] * 10)
        await crept.done()
    for answer in (announced, crept):
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")
        assert answer.headers["connection"] == "close"
        assert answer.complete
    assert queue.enqueued.empty()


async def test_more_requests_than_the_limit_are_refused() -> None:
    """One request too many gets 429 with Retry-After, and room is made when one ends."""
    queue = FakeQueue("m")
    async with router(queue, max_concurrent_requests=1) as app:
        first = Client(app).post(CHAT)
        job = await queue.job()
        second = await Client(app).post(CHAT).done()
        assert (second.status, second.error["code"], second.headers["retry-after"]) == (429, "over_capacity", "1")
        queue.answer(job, b"1")
        await first.done()
        third = Client(app).post(CHAT)
        queue.answer(await queue.job(), b"3")
        assert (await third.done()).status == 200


async def test_keys_name_the_tenant_and_are_not_passed_on() -> None:
    """With keys, a request needs one; the job carries the tenant and nothing of the key."""
    queue = FakeQueue("m")
    digest = hashlib.sha256(b"sk-1").hexdigest()
    async with router(queue, api_keys=f"{digest}:acme") as app:
        for headers in ({}, {"authorization": "Bearer sk-2"}, {"authorization": "Basic sk-1"}):
            refused = await Client(app).post(CHAT, headers=headers).done()
            assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
        for headers in ({"authorization": "Bearer sk-1"}, {"x-api-key": "sk-1"}):
            answer = Client(app).post(CHAT, headers=headers)
            job = await queue.job()
            assert job.tenant == "acme"
            assert b"sk-1" not in job.pack()
            queue.answer(job, b"1")
            assert (await answer.done()).status == 200


async def test_before_the_queue_is_there_requests_are_refused_clearly() -> None:
    """Without a queue a request gets 503 with the reason, at once."""
    async with router(None) as app:
        answer = await Client(app).post(CHAT).done()
    assert (answer.status, answer.error["code"]) == (503, "broker_unavailable")
    assert "retry-after" in answer.headers


async def test_a_drain_finishes_open_requests_and_refuses_new_ones() -> None:
    """An open request gets its answer, a new one 503, and one that takes too long an error."""
    queue = FakeQueue("m")
    async with router(queue, shutdown_timeout_ms=300) as app:
        good, late = Client(app).post(CHAT), Client(app).post(STREAM)
        jobs = [await queue.job(), await queue.job()]
        queue.stream(jobs[1], chunk("a"), end=False)
        await late.until(lambda: late.body != b"")
        draining = asyncio.ensure_future(app.drain())
        await asyncio.sleep(0)
        refused = await Client(app).post(CHAT).done()
        assert (refused.status, refused.error["code"]) == (503, "shutting_down")
        assert "retry-after" in refused.headers
        queue.answer(jobs[0], b"1")
        assert (await good.done()).status == 200
        await draining
        await late.done()
        assert b'"shutting_down"' in late.body
        assert await queue.cancellation() == (jobs[1].id, "its Router abandoned it")


class SlowCancels(FakeQueue):
    """A queue that takes a moment to answer a cancel, as one over a network does."""

    async def cancel(self, job_id: JobId, reason: str, *, if_orphaned: bool = False, used: int = 0) -> State | None:
        await asyncio.sleep(0.05)
        return await super().cancel(job_id, reason, if_orphaned=if_orphaned, used=used)


async def test_the_job_of_a_client_that_is_cut_off_after_the_drain_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client that does not read outlasts the drain; the server cuts it off as it ends, and its job is cancelled."""
    monkeypatch.setattr("router.shutdown.FINAL_SENDS_S", 0.2)
    queue = SlowCancels("m")
    async with router(queue, shutdown_timeout_ms=50) as app:
        client = Client(app)
        client.reading.clear()
        stuck = client.post(STREAM)
        job = await queue.job()
        queue.stream(job, chunk("a"), end=False)
        await app.drain()
        stuck.task.cancel()
        await asyncio.wait((stuck.task,))
    assert queue.cancelled.get_nowait() == (job.id, "its Router abandoned it")


async def test_a_form_is_forwarded_unchanged() -> None:
    """A multipart upload is read for its model only; body and content type travel as they came."""
    queue = FakeQueue("m")
    body = (
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="model"\r\n\r\n\x00\xffsound\r\n'
        b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'
        b'--B\r\nContent-Disposition: form-data; name="stream"\r\n\r\nTrue\r\n--B--\r\n'
    )
    async with router(queue) as app:
        kind = "multipart/form-data; boundary=B"
        answer = Client(app).post(body, "/v1/audio/transcriptions", {"content-type": kind})
        job = await queue.job()
        queue.stream(job, DONE)
        await answer.done()
    assert (job.body, job.content_type, job.model, job.stream) == (body, kind, "m", True)


async def test_latencies_and_requests_are_counted() -> None:
    """Requests, time to first byte and inter-token latency show in the metrics, by model."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(STREAM)
        job = await queue.job()
        queue.stream(job, chunk("a"), end=False)
        await answer.until(lambda: answer.body != b"")
        queue.stream(job, DONE, first=1)
        await answer.done()
        text = (await Client(app).request("GET", "/metrics")).body.decode()
    assert 'inferq_requests_total{code="200",path="/v1/chat/completions",role="router"} 1.0' in text
    assert 'inferq_ttft_seconds_count{model="m"} 1.0' in text
    assert 'inferq_itl_seconds_count{model="m"} 1.0' in text
    assert 'inferq_itl_seconds_bucket{le="+Inf",model="m"} 1.0' in text


@pytest.mark.parametrize("announced", [True, False])
async def test_bodies_in_flight_are_bounded_in_bytes(announced: bool) -> None:
    """Beyond the limit a body is refused with 429 and Retry-After, by its length or as it comes; the room of a request
    that is over is free again."""
    queue = FakeQueue("m")
    body = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 1000}]})
    headers = {"content-length": str(len(body))} if announced else {}
    path = "/v1/chat/completions"
    async with router(queue, max_body_bytes=2048, max_inflight_body_bytes=2048) as app:
        client = Client(app)
        first = client.begin("POST", path, [body[:500], body[500:]], headers)
        job = await queue.job()
        refused = await client.begin("POST", path, [body[:500], body[500:]], headers).done()
        assert (refused.status, refused.error["code"]) == (429, "over_capacity")
        assert int(refused.headers["retry-after"]) >= 1
        assert app.services.requests.body_bytes == len(body)
        queue.answer(job, b"{}")
        assert (await first.done()).status == 200
        assert app.services.requests.body_bytes == 0
        again = client.begin("POST", path, [body], headers)
        queue.answer(await queue.job(), b"{}")
        assert (await again.done()).status == 200


async def test_an_announced_size_reserves_no_room() -> None:
    """[B9] A body that does not fit is refused by its announced length; one that does not come keeps nobody out."""
    async with router(FakeQueue("m"), max_body_bytes=2048, max_inflight_body_bytes=2048) as app:
        client = Client(app)
        nothing = client.begin("POST", "/v1/completions", [b""], {"content-length": "2048"}, unfinished=True)
        part = client.begin("POST", "/v1/completions", [b"x" * 1500], {"content-length": "1600"}, unfinished=True)
        await eventually(lambda: app.services.requests.body_bytes == 1500, "what has arrived counts")
        refused = client.begin("POST", "/v1/completions", [b""], {"content-length": "600"}, unfinished=True)
        assert (await refused.done()).status == 429
        client.gone.set()
        await nothing.done()
        await part.done()
        assert app.services.requests.body_bytes == 0


async def test_malformed_headers_are_normalized_ignored_or_refused() -> None:
    """A trace in a wrong form is ignored, a tab in the content type is a space, other odd characters are refused."""
    queue = FakeQueue("m")
    trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    async with router(queue) as app:
        for given, kept in (("foo bar", ""), (trace + "-x", ""), (trace, trace)):
            headers = {"traceparent": given, "content-type": "application/json;\tcharset=utf-8"}
            answer = Client(app).post(CHAT, headers=headers)
            job = await queue.job()
            assert (job.traceparent, job.content_type) == (kept, "application/json; charset=utf-8")
            queue.answer(job, b"1")
            assert (await answer.done()).status == 200
        for wrong in ("application/json\x01", "application/jsön"):
            refused = await Client(app).post(CHAT, headers={"content-type": wrong}).done()
            assert (refused.status, refused.error["code"]) == (400, "invalid_request")
    assert queue.enqueued.empty()


async def test_a_running_stream_survives_a_restart_of_redis() -> None:
    """When frames may be lost, a job that the queue says is running continues: nothing is cancelled or run again."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(STREAM)
        job = await queue.job()
        queue.stream(job, chunk("a"), end=False)
        queue.state, queue.job_status = State.LEASED, JobStatus(State.LEASED, 1, "a1")
        queue.lose_replies()
        assert (await queue.job()).id == job.id
        queue.stream(job, chunk("b"), first=1)
        body = (await answer.done()).body
    assert body.count(b'"a"') == 1
    assert body.count(b'"b"') == 1
    assert queue.cancelled.empty()


async def test_a_stream_whose_job_vanished_with_redis_runs_again() -> None:
    """A job with delivered frames that the queue has forgotten runs again under another id and is compared."""
    queue = FakeQueue("m")
    async with router(queue) as app:
        answer = Client(app).post(STREAM)
        job = await queue.job()
        queue.stream(job, chunk("a"), end=False)
        queue.lose_replies()
        assert (await queue.job()).id == job.id
        again = await queue.job()
        assert again.id != job.id
        queue.stream(again, chunk("a"), chunk("b"))
        body = (await answer.done()).body
    assert body.count(b'"a"') == 1
    assert body.count(b'"b"') == 1
