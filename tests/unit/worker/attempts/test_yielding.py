"""Attempts that yield to interactive jobs: their answers are composed of streams, and go on behind what was said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import orjson
import pytest

from broker import Broker
from openai_api.completions.whole_answer import MAX_PREFIX_BYTES
from openai_api.sse import DONE_EVENT, encode_json
from queue_schemas import CONTINUED, HEAD, EngineFailed, Job, Lane, Lease, Outcome
from scheduling.preemption import YieldPolicy
from tests.support.queue import MODEL
from tests.support.waiting import eventually
from tests.unit.worker.attempts.scripted_engine import SSE, Answer, Bench, lease, plain
from worker.attempts.continuation_planner import RETRY_PROBE_S, ContinuationProbe
from worker.core import Slots
from worker.engines import EngineAnswer, EngineCall
from worker.preemption import Preemption

BODY = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9})
BASE = {"id": "1", "object": "chat.completion.chunk", "created": 17, "model": "m"}


def said(content: str, finish: str | None = None) -> bytes:
    """The event of a piece of an answer."""
    return encode_json(BASE | {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish}]})


def end(tokens: int) -> bytes:
    """The usage and the end of a stream."""
    usage = {"prompt_tokens": 2, "completion_tokens": tokens, "total_tokens": 2 + tokens}
    return encode_json(BASE | {"choices": [], "usage": usage}) + DONE_EVENT


class Engine:
    """Answers chats with the next of ``answers``; its tokens are letters."""

    def __init__(self, bench: Bench, *answers: Answer, continues: bool = True) -> None:
        self.asked: list[dict[str, Any]] = []
        self.probes = 0
        """How often it was asked for the tokens of a prompt."""
        self._engine = bench.engine
        self._call = bench.engine.call
        self._answers = list(answers)
        self._continues = continues

    @asynccontextmanager
    async def call(self, call: EngineCall) -> AsyncIterator[EngineAnswer]:
        request = orjson.loads(call.body)
        self.probes += call.path == "/tokenize"
        if call.path == "/tokenize":
            text = "".join(message["content"] for message in request["messages"])
            self._engine.answer = plain(200 if self._continues else 404, orjson.dumps({"tokens": list(map(ord, text))}))
        elif call.path == "/detokenize":
            self._engine.answer = plain(200, orjson.dumps({"prompt": "".join(map(chr, request["tokens"]))}))
        else:
            self.asked.append(request)
            self._engine.answer = self._answers.pop(0)
        async with self._call(call) as answer:
            yield answer


class Scene:
    """A worker of ``slots`` slots, all of which are busy while an attempt runs, and its preemption."""

    def __init__(self, *answers: Answer, continues: bool = True, busy: int = 1, **policy: float) -> None:
        self.bench = Bench(plain(200))
        self.engine = Engine(self.bench, *answers, continues=continues)
        self.bench.engine.call = self.engine.call  # type: ignore[method-assign]
        self.slots = Slots(1, busy=busy)
        self.policy = YieldPolicy(**({"share": 1.0, "min_gain_s": 0.0} | policy))
        self.preemption = Preemption(
            cast(Broker, self.bench.broker), self.policy, self.slots, self.bench.attempts, self.bench.metrics
        )

    @property
    def answer(self) -> dict[str, Any]:
        """What the one attempt was settled with."""
        ((_, outcome, (frame,)),) = self.bench.broker.settled
        assert outcome is Outcome.DONE
        assert (frame.status, frame.content_type) == (200, "application/json")
        return dict(orjson.loads(frame.data))

    def refused(self, reason: str) -> float:
        """How often an attempt was asked and ran on for that reason."""
        return float(self.bench.metrics.yields_refused(MODEL, reason)._value.get())


def line(prefix: str = "", yields: int = 2, **fields: Any) -> Lease:
    """An attempt at a line of a batch."""
    return lease(lane=Lane.BATCH, body=BODY, prefix=prefix, yields=yields, **fields)


async def test_a_line_is_asked_for_as_a_stream_and_answered_whole() -> None:
    """If nothing happens, nobody can tell."""
    scene = Scene(Answer(200, SSE, [said("Once"), said(" upon", "stop"), end(2)]))
    await scene.bench.run(line())
    assert scene.engine.asked[0]["stream"] is True
    assert scene.answer["object"] == "chat.completion"
    assert scene.answer["choices"][0]["message"]["content"] == "Once upon"
    assert scene.answer["usage"]["completion_tokens"] == 2


async def test_an_engine_is_asked_once_whether_it_continues() -> None:
    """Not for each line; and again soon if it did not answer."""
    scene = Scene(*(Answer(200, SSE, [said("Once", "stop"), end(1)]) for _ in range(3)), plain(200), plain(200))
    await scene.bench.run(line(), line(), line())
    assert scene.engine.probes == 2
    probe = ContinuationProbe(scene.bench.engine)
    scene.bench.engine.call = _broken  # type: ignore[method-assign]
    assert not await probe.can_continue(line().job)
    ((_, until),) = probe._found.values()
    assert until - asyncio.get_running_loop().time() <= RETRY_PROBE_S


@asynccontextmanager
async def _broken(_call: EngineCall) -> AsyncIterator[EngineAnswer]:
    raise EngineFailed("it is away")
    yield


async def test_a_line_yields_with_what_it_said() -> None:
    """Its engine call is closed; the job goes on behind its text, and may yield once less."""
    scene = Scene(Answer(200, SSE, [said("Once"), said(" upon"), asyncio.Event()]))
    job_lease = line()
    async with scene.bench.running(job_lease):
        await eventually(lambda: _text(scene, job_lease) == "Once upon", "it has said something")
        await scene.preemption.ask(job_lease.attempt_id)
        await scene.preemption.ask(job_lease.attempt_id)
    assert scene.bench.engine.left_early == 1
    assert scene.bench.broker.yields == [replace(job_lease.job, prefix="Once upon", yields=1)]
    assert not scene.bench.broker.released
    assert scene.refused("ended") == 1
    await scene.preemption.ask(job_lease.attempt_id)


def _text(scene: Scene, job_lease: Lease) -> str | None:
    attempt = scene.bench.attempts.running(job_lease.attempt_id)
    return attempt.whole.text if attempt is not None and attempt.whole is not None else None


async def test_white_space_at_the_end_is_said_once_more() -> None:
    """Chat templates may strip it off, and no engine would go on behind it."""
    scene = Scene(Answer(200, SSE, [said("Once \n\n"), asyncio.Event()]))
    job_lease = line()
    async with scene.bench.running(job_lease):
        await eventually(lambda: _text(scene, job_lease), "it has said something")
        await scene.preemption.ask(job_lease.attempt_id)
    assert scene.bench.broker.yields == [replace(job_lease.job, prefix="Once", yields=1)]


async def test_it_goes_on_behind_what_was_said() -> None:
    """One answer comes of both, with the usage of one: the prompt's tokens are the original prompt's."""
    scene = Scene(Answer(200, SSE, [said(" upon"), said(" a", "length"), end(4)]))
    await scene.bench.run(line("Once"))
    (request,) = scene.engine.asked
    assert request["messages"][-1] == {"role": "assistant", "content": "Once"}
    assert request["max_tokens"] == 5
    assert scene.answer["choices"][0]["message"]["content"] == "Once upon a"
    assert scene.answer["usage"]["completion_tokens"] == 8


async def test_a_limit_that_was_reached_needs_no_engine() -> None:
    """All was said before it yielded."""
    scene = Scene()
    await scene.bench.run(line("Once upon"))
    assert scene.answer["choices"][0]["message"]["content"] == "Once upon"
    assert scene.answer["choices"][0]["finish_reason"] == "length"
    assert scene.answer["created"] > 1_600_000_000


async def test_an_engine_that_cannot_go_on_is_not_interrupted() -> None:
    """Its lines are asked for plainly."""
    scene = Scene(Answer(200, "application/json", [b"{}", gate := asyncio.Event()]), continues=False)
    job_lease = line()
    async with scene.bench.running(job_lease):
        await eventually(lambda: scene.engine.asked, "the engine is asked")
        await scene.preemption.ask(job_lease.attempt_id)
        gate.set()
    assert "stream" not in scene.engine.asked[0]
    assert not scene.bench.broker.yields
    assert len(scene.bench.broker.settled) == 1
    assert scene.refused("not_continuable") == 1


async def test_what_yielded_runs_anew_on_an_engine_that_cannot_go_on_and_yields_no_more() -> None:
    """Nothing of the earlier text is in its answer."""
    scene = Scene(Answer(200, SSE, [said("Twice"), gate := asyncio.Event(), said("", "stop"), end(1)]), continues=False)
    job_lease = line("Once")
    async with scene.bench.running(job_lease):
        await eventually(lambda: _text(scene, job_lease) == "Twice", "it has begun anew")
        await scene.preemption.ask(job_lease.attempt_id)
        gate.set()
    assert scene.answer["choices"][0]["message"]["content"] == "Twice"
    assert not scene.bench.broker.yields


@pytest.mark.parametrize("first", [plain(400, b'{"error": {}}'), plain(501)], ids=["refused", "not implemented"])
async def test_an_engine_that_does_not_stream_is_asked_plainly(first: Answer) -> None:
    """The answer is the one to the client's own request, error or not."""
    scene = Scene(first, plain(200, b'{"as": "it came"}'))
    await scene.bench.run(line())
    assert scene.answer == {"as": "it came"}
    assert scene.engine.asked[1] == orjson.loads(BODY)


async def test_an_engine_that_answers_plainly_is_not_interrupted() -> None:
    """What it was asked for as a stream and is none would be lost."""
    scene = Scene(Answer(200, "application/json", [b"{}", gate := asyncio.Event()]))
    job_lease = line()
    async with scene.bench.running(job_lease):
        await eventually(lambda: not _may_yield(scene, job_lease), "it answers plainly")
        await scene.preemption.ask(job_lease.attempt_id)
        gate.set()
    assert not scene.bench.broker.yields
    assert scene.answer == {}


def _may_yield(scene: Scene, job_lease: Lease) -> bool:
    attempt = scene.bench.attempts.running(job_lease.attempt_id)
    return attempt is None or not scene.engine.asked or attempt.may_yield


@pytest.mark.parametrize(("attempt", "kept"), [(1, False), (3, True)])
async def test_an_error_within_the_stream_is_an_error_of_the_engine(attempt: int, kept: bool) -> None:
    """Tried elsewhere, and the answer of the last attempt."""
    error = {"error": {"message": "no room", "type": "server_error", "param": None, "code": 503}}
    scene = Scene(Answer(200, SSE, [said("Once"), encode_json(error) + DONE_EVENT]))
    await scene.bench.run(replace(line(), attempt=attempt))
    if kept:
        ((_, outcome, (frame,)),) = scene.bench.broker.settled
        assert (outcome, frame.status, orjson.loads(frame.data)) == (Outcome.FAILED, 503, error)
    else:
        assert scene.bench.broker.released == [("the engine answered 503", True)]


async def test_a_stream_that_breaks_is_no_answer() -> None:
    """It is run again."""
    scene = Scene(Answer(200, SSE, [said("Once")], delimited=True))
    await scene.bench.run(line())
    assert not scene.bench.broker.settled
    ((_, counted),) = scene.bench.broker.released
    assert counted


async def test_what_has_said_all_does_not_yield() -> None:
    """Only the end of its stream is missing."""
    scene = Scene(Answer(200, SSE, [said("Once", "stop"), gate := asyncio.Event(), end(1)]))
    job_lease = line()
    async with scene.bench.running(job_lease):
        await eventually(lambda: _has(scene, job_lease), "it has said all")
        await scene.preemption.ask(job_lease.attempt_id)
        gate.set()
    assert scene.answer["choices"][0]["message"]["content"] == "Once"
    assert scene.refused("ending") == 1
    assert scene.bench.broker.declined == [False]


def _has(scene: Scene, job_lease: Lease) -> bool:
    attempt = scene.bench.attempts.running(job_lease.attempt_id)
    return attempt is not None and attempt.whole is not None and attempt.whole.text is None


async def test_a_long_text_does_not_travel() -> None:
    """It would be in the job's envelope."""
    scene = Scene(Answer(200, SSE, [said("x" * (MAX_PREFIX_BYTES + 1)), gate := asyncio.Event(), end(1)]))
    scene.bench.attempts._relay.max_answer_bytes = 1 << 20
    job_lease = line()
    async with scene.bench.running(job_lease):
        await eventually(lambda: _text(scene, job_lease), "it has said much")
        await scene.preemption.ask(job_lease.attempt_id)
        assert scene.refused("too_long") == 1
        scene.bench.attempts.abort(job_lease.job.id, "enough")
        gate.set()


async def test_one_that_is_only_starting_is_asked_again() -> None:
    """Those that began last are asked first: while their engine is asked whether it continues, they decline for now."""
    scene = Scene(Answer(200, SSE, [said("Once", "stop"), end(1)]))
    known, probed = scene.bench.engine.call, asyncio.Event()

    @asynccontextmanager
    async def slow(call: EngineCall) -> AsyncIterator[EngineAnswer]:
        await probed.wait()
        async with known(call) as answer:
            yield answer

    scene.bench.engine.call = slow  # type: ignore[method-assign]
    job_lease = line()
    async with scene.bench.running(job_lease):
        await asyncio.sleep(0)
        await scene.preemption.ask(job_lease.attempt_id)
        probed.set()
    assert scene.bench.broker.declined == [True]
    assert scene.refused("starting") == 1


async def test_nothing_yields_for_a_job_that_has_a_slot() -> None:
    """A claim that was under way when the queue asked has brought the interactive job."""
    scene = Scene(Answer(200, SSE, [gate := asyncio.Event(), said("Once", "stop"), end(1)]), plain(200), busy=0)
    job_lease = line()
    async with scene.bench.running(job_lease), asyncio.TaskGroup() as group:
        await eventually(lambda: scene.engine.asked, "it runs")
        asked = group.create_task(scene.preemption.ask(job_lease.attempt_id))
        await asyncio.sleep(0)
        scene.slots.busy = 1
        scene.bench.attempts.start([lease()], group)
        await asked
        gate.set()
    assert not scene.bench.broker.yields
    assert scene.refused("slot_free") == 1


async def test_it_yields_if_the_claim_under_way_brought_another_line() -> None:
    """Then the interactive job still waits."""
    scene = Scene(Answer(200, SSE, [asyncio.Event()]), busy=0)
    job_lease = line()
    async with scene.bench.running(job_lease):
        await eventually(lambda: scene.engine.asked, "it runs")
        asked = asyncio.create_task(scene.preemption.ask(job_lease.attempt_id))
        await asyncio.sleep(0)
        scene.slots.busy = 1
        await asked
    assert len(scene.bench.broker.yields) == 1


async def test_a_flood_takes_no_more_than_the_share() -> None:
    """Of 8 slots, 2 in a second; a slot that is due soon is waited for."""
    scene = Scene(*(Answer(200, SSE, [asyncio.Event()]) for _ in range(8)), share=0.25, busy=8)
    scene.slots.total = 8
    leases = [line() for _ in range(8)]
    async with scene.bench.running(*leases):
        await eventually(lambda: len(scene.engine.asked) == 8, "all run")
        for one in leases:
            await scene.preemption.ask(one.attempt_id)
        await eventually(lambda: len(scene.bench.broker.yields) == 2, "some yield")
        assert scene.refused("share") == 6
        assert scene.bench.broker.declined == [True] * 6
        scene.bench.attempts.hand_back()
    assert len(scene.bench.broker.yields) == 2


async def test_a_report_that_is_lost_is_sent_again() -> None:
    """Until the queue answers."""
    scene = Scene(Answer(200, SSE, [said("Once"), asyncio.Event()]))
    scene.bench.broker.failures = 1
    job_lease = line()
    async with scene.bench.running(job_lease):
        await eventually(lambda: _text(scene, job_lease) == "Once", "it has said something")
        await scene.preemption.ask(job_lease.attempt_id)
    assert len(scene.bench.broker.yields) == 1


async def test_a_job_that_is_cancelled_while_it_yields_is_dropped() -> None:
    """The queue has ended it: whichever comes first, nothing of it is settled."""
    scene = Scene(Answer(200, SSE, [said("Once"), asyncio.Event()]))
    job_lease = line()
    async with scene.bench.running(job_lease):
        await eventually(lambda: _text(scene, job_lease) == "Once", "it has said something")
        scene.bench.attempts.abort(job_lease.job.id, "cancelled")
        await scene.preemption.ask(job_lease.attempt_id)
    assert not scene.bench.broker.yields
    assert not scene.bench.broker.settled


async def test_a_persisted_stream_goes_on_behind_its_output() -> None:
    """What was said is in its output before it yields; the next attempt reads it there."""
    scene = Scene(
        Answer(200, SSE, [said("Once"), said(" upon"), asyncio.Event()]),
        Answer(200, SSE, [said(" a", "stop"), DONE_EVENT]),
    )
    body = orjson.dumps(orjson.loads(BODY) | {"stream": True, "max_tokens": 20})
    fields: dict[str, Any] = {"lane": Lane.BACKGROUND, "stream": True, "persisted": True, "on_loss": "continue"}
    job_lease = lease(body=body, yields=2, **fields)
    broker = scene.bench.broker
    async with scene.bench.running(job_lease):
        await eventually(lambda: scene.bench.broker.appended, "it has said something")
        await scene.preemption.ask(job_lease.attempt_id)
    assert broker.yields == [None]
    assert b" upon" in b"".join(frame.data for frame in broker.appended)
    broker.kept = [frame for frame in broker.appended if frame.data]
    await scene.bench.run(replace(job_lease, epoch=2, attempt_id="again"))
    assert scene.engine.asked[1]["messages"][-1]["content"] == "Once upon"
    again = next(frame for frame in broker.appended if frame.epoch == 2)
    assert again.flags == HEAD | CONTINUED


async def test_with_preemption_off_lines_are_asked_plainly() -> None:
    """And those that yielded elsewhere go on all the same."""
    scene = Scene(plain(200, b'{"as": "it came"}'), Answer(200, SSE, [said(" upon", "stop"), end(1)]))
    scene.bench.attempts._runner._preemption = False
    await scene.bench.run(line())
    assert "stream" not in scene.engine.asked[0]
    job: Job = line("Once").job
    await scene.bench.run(replace(line(), job=job))
    (_, _, (frame,)) = scene.bench.broker.settled[1]
    assert orjson.loads(frame.data)["choices"][0]["message"]["content"] == "Once upon"
