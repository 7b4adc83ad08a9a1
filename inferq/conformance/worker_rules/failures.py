"""Rules about failures: of the engine, of attempts that lost their jobs, and of the way to the Router."""

from __future__ import annotations

import asyncio

from aiohttp import web

from ..scorecard import Rule
from ..scripted_engine import event, plain_answer, whole_stream
from ..scripted_queue import chat
from ..scripted_router import Fault
from ..worker_kit import WorkerKit
from .checks import check_answer, check_released, require


async def _engine_breaks(kit: WorkerKit) -> None:
    [attempt] = await kit.run(chat("break 3", stream=True))
    # An engine that breaks off may have crashed.
    kinds = ("spent", "crashed")
    require(not attempt.settles, "a stream that broke off was settled, although its end never came")
    require(attempt.releases[0].kind in kinds, f"it was released as {attempt.releases[0].kind}, not spent")
    whole = b"".join(map(event, range(3)))
    require(whole.startswith(attempt.output), "it sent something that the engine did not say")


async def _engine_fails(kit: WorkerKit) -> None:
    [attempt] = await kit.run(chat("status 500"))
    check_released(attempt, "spent")


async def _engine_fails_last(kit: WorkerKit) -> None:
    job = chat("status 503")
    job.first_attempt = 3
    [attempt] = await kit.run(job)
    require(bool(attempt.settles), "the engine's answer to the last attempt was not settled: its client should see it")
    check_answer(attempt, b'{"error": {"message": "scripted"}}', status=503, content_type="application/json")


async def _engine_garbage(kit: WorkerKit) -> None:
    [attempt] = await kit.run(chat("garbage"))
    passed_on = bool(attempt.settles) and attempt.heads[0].status < 500
    require(not passed_on, "what says that it is JSON, and is none, was settled as an answer")


async def _fenced_attempt(kit: WorkerKit) -> None:
    attempt = await kit.begun(chat("slow 60", stream=True))
    attempt.answer = "fenced"
    await kit.until(lambda: kit.engine.running == 0, "it stops an attempt whose output is answered fenced")
    require(not attempt.settles, "it settled an attempt that is fenced")


async def _gone_attempt(kit: WorkerKit) -> None:
    attempt = await kit.begun(chat("slow 60", stream=True))
    attempt.answer = "gone"
    await kit.until(lambda: kit.engine.running == 0, "it stops an attempt whose output is answered gone")
    await kit.until(lambda: attempt.ended, "it releases an attempt whose output is answered gone")
    check_released(attempt, "handed_back")


async def _router_restarts(kit: WorkerKit) -> None:
    attempt = await kit.begun(chat("slow 30", stream=True))
    session_id = kit.router.session_id
    await kit.router.stop()
    await asyncio.sleep(1.0)
    await kit.router.start()
    await kit.until(lambda: attempt.ended, "the stream ends once the Router is back", limit_s=25.0)
    require(kit.router.session_id == session_id, "it began a new session because its Router restarted")
    check_answer(attempt, whole_stream(30), content_type="text/event-stream")


async def _router_leaves(kit: WorkerKit) -> None:
    kit.router.refusals["claim"] = (503, "shutting_down")
    kit.queue.tell("wake")  # what is held is answered still
    before = kit.router.seen.calls["claim"]
    await asyncio.sleep(1.5)
    asked = kit.router.seen.calls["claim"] - before
    require(asked <= 25, f"it asked a Router that says 503 {asked} times in 1.5 s: without a pause")
    kit.router.refusals.clear()
    [attempt] = await kit.run(chat("stream 3", stream=True), limit_s=25.0)
    check_answer(attempt, whole_stream(3), content_type="text/event-stream")


async def _malformed(kit: WorkerKit) -> None:
    answers = (
        web.Response(status=200, body=b"{", content_type="application/json"),
        web.Response(status=200, body=b'{"claimed": {"jobs": 7}, "messages": "none"}', content_type="application/json"),
        web.Response(status=502, body=b"<html>Bad Gateway</html>", content_type="text/html"),
        web.Response(status=200, body=b"\xc1\xff\x00", content_type="application/vnd.msgpack"),
    )
    for answer in answers:
        kit.router.fail_next("claim", Fault(answer=answer))
    for name in ("settle", "heartbeat"):
        kit.router.fail_next(name, Fault(answer=answers[2]))
    kit.queue.tell("wake")
    [attempt] = await kit.run(chat("plain still"), limit_s=30.0)
    check_answer(attempt, plain_answer("plain still"), content_type="application/json")


async def _slow_link(kit: WorkerKit) -> None:
    kit.router.bytes_per_s = 400.0
    [attempt] = await kit.run(chat("stream 5", stream=True), limit_s=40.0)
    check_answer(attempt, whole_stream(5), content_type="text/event-stream")


FAILURE_RULES: tuple[Rule[WorkerKit], ...] = (
    Rule("broken-stream", "a stream that the engine breaks off is released, not settled", _engine_breaks),
    Rule("garbage", "an answer that says it is JSON and is none counts as an error of the engine", _engine_garbage),
    Rule("engine-error", "an engine's error spends the attempt", _engine_fails),
    Rule("last-error", "in the last attempt it is the answer", _engine_fails_last),
    Rule("fenced-attempt", "an attempt that lost its job is stopped", _fenced_attempt),
    Rule("gone", "an attempt for which nobody waits is stopped and handed back", _gone_attempt),
    Rule("router-restart", "a stream and its session outlive a restart of the Router", _router_restarts),
    Rule("router-leaves", "a Router that takes no claims is asked again after a pause", _router_leaves),
    Rule("malformed-answers", "answers that are no messages are treated as none", _malformed),
    Rule("slow-link", "it works over a slow link", _slow_link),
)
