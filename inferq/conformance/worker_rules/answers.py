"""Rules about answers: every byte of a request reaches the engine, every byte of its answer the Router, in order."""

from __future__ import annotations

import asyncio

from ..scorecard import Rule
from ..scripted_engine import BINARY, LARGE, plain_answer, whole_stream
from ..scripted_queue import Job, chat
from ..scripted_router import Fault
from ..worker_kit import WorkerKit
from .checks import check_answer, require

_ODD = (
    b'{ "messages":[{"role" : "user","content":"plain \\u00e9\\n"}] ,'
    b'  "model":"model-under-test","n": 1.0e0, "z":null }\n'
)
_FORM = b'--x\r\ncontent-disposition: form-data; name="file"\r\n\r\n\xff\x00\xfe\r\n--x--\r\n'


async def _plain(kit: WorkerKit) -> None:
    [attempt] = await kit.run(chat("plain words"))
    check_answer(attempt, plain_answer("plain words"), content_type="application/json")


async def _bodies(kit: WorkerKit) -> None:
    odd, form = Job(_ODD), Job(_FORM, path="/v1/audio/transcriptions", content_type="multipart/form-data; boundary=x")
    await kit.run(odd, form)
    sent = {call.path: call for call in kit.engine.calls}
    require(sent["/v1/chat/completions"].body == _ODD, "the body that reached the engine is not the client's")
    found = sent["/v1/audio/transcriptions"]
    require(found.body == _FORM, "a body that is no UTF-8 did not reach the engine as it was")
    require(found.content_type == form.content_type, f"its content type became {found.content_type}")


async def _refused(kit: WorkerKit) -> None:
    [attempt] = await kit.run(chat("status 422"))
    check_answer(attempt, b'{"error": {"message": "scripted"}}', status=422, content_type="application/json")


async def _binary(kit: WorkerKit) -> None:
    [attempt] = await kit.run(chat("bytes"))
    check_answer(attempt, BINARY, content_type="audio/mpeg")


async def _large(kit: WorkerKit) -> None:
    [attempt] = await kit.run(chat("large"), limit_s=40.0)
    require(not kit.router.seen.faults, f"{kit.router.seen.faults[:1]}")
    check_answer(attempt, LARGE, content_type="application/octet-stream")


async def _stream(kit: WorkerKit) -> None:
    [attempt] = await kit.run(chat("slow 10", stream=True))
    check_answer(attempt, whole_stream(10), content_type="text/event-stream")
    spread = attempt.arrived_at[-1] - attempt.arrived_at[0]
    require(spread >= 0.5, f"a stream of one second came within {spread:.1f} s: it was held back")
    for n, piece in attempt.pieces.items():
        require(not piece or piece.endswith(b"\n\n"), f"piece {n} ends within an event: {piece[-40:]!r}")
    heads = len(attempt.heads)
    require(heads == 1, f"{heads} pieces came with a head; piece 0 has one")


async def _many_streams(kit: WorkerKit) -> None:
    jobs = [chat(f"stream {5 + n}", stream=True) for n in range(12)]
    await kit.run(*jobs)
    for n, job in enumerate(jobs):
        check_answer(job.last, whole_stream(5 + n), content_type="text/event-stream")


async def _prefix(kit: WorkerKit) -> None:
    [attempt] = await kit.run(chat("stream 4", stream=True, prefix="word0 word1 "))
    require(bool(attempt.settles), "a job with a prefix was released")
    if attempt.heads[0].continued:
        said = "it says continued, and has not asked the engine to go on behind the prefix"
        require(b"word0 word1 " in kit.engine.calls[-1].body, said)
    else:
        check_answer(attempt, whole_stream(4), content_type="text/event-stream")


async def _repeated_output(kit: WorkerKit) -> None:
    kit.router.fail_next("output", Fault(carried_out=True))
    kit.router.fail_next("output", Fault())
    [attempt] = await kit.run(chat("slow 6", stream=True), limit_s=20.0)
    check_answer(attempt, whole_stream(6), content_type="text/event-stream")


async def _repeated_settle(kit: WorkerKit) -> None:
    kit.router.fail_next("settle", Fault(carried_out=True))
    kit.router.fail_next("settle", Fault())
    before = kit.router.seen.calls["settle"]
    [attempt] = await kit.run(chat("plain settled"), limit_s=20.0)
    await kit.until(lambda: kit.router.seen.calls["settle"] >= before + 3, "a settle is repeated until it is answered")
    check_answer(attempt, plain_answer("plain settled"), content_type="application/json")
    [other] = await kit.run(chat("plain next"))
    check_answer(other, plain_answer("plain next"), content_type="application/json")


async def _full(kit: WorkerKit) -> None:
    job = chat("slow 12", stream=True)
    attempt = await kit.begun(job)
    attempt.answer = "full"
    before = kit.router.seen.calls["output"]
    await asyncio.sleep(1.0)
    calls = kit.router.seen.calls["output"] - before
    require(1 <= calls <= 40, f"output that was answered full was sent {calls} times within a second")
    require(not attempt.settles, "a stream was settled while its pieces are not taken")
    attempt.answer = "ok"
    await kit.until(lambda: attempt.ended, "the stream goes on once its pieces are taken", limit_s=20.0)
    check_answer(attempt, whole_stream(12), content_type="text/event-stream")


ANSWER_RULES: tuple[Rule[WorkerKit], ...] = (
    Rule("plain-answer", "a plain answer is settled as it is, with its status and content type", _plain),
    Rule("body", "the body of a request reaches the engine byte for byte", _bodies),
    Rule("refusal", "an engine's refusal is settled as failed, as it is", _refused),
    Rule("bytes", "an answer that is no text arrives as it is", _binary),
    Rule("large-answer", "an answer of more than 16 MiB is sent in several calls", _large),
    Rule("stream", "a stream is sent while it comes, in whole events without a gap", _stream),
    Rule("many-streams", "streams side by side are not mixed up", _many_streams),
    Rule("prefix", "a job with a prefix is continued and says so, or begins anew", _prefix),
    Rule("repeated-output", "output whose answer is lost is sent again under its numbers", _repeated_output),
    Rule("repeated-settle", "a settle is repeated until it is answered", _repeated_settle),
    Rule("full", "where nobody reads it sends again after a while, and loses nothing", _full),
)
