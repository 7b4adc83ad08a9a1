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
from queue_schemas import CONTINUED, HEAD, Assignment, Job, Lane, Lease, Outcome, PoolAssignment
from scheduling.preemption import YieldPolicy
from tests.support.queue import MODEL
from tests.support.waiting import eventually
from tests.unit.worker.attempts.scripted_engine import SSE, Answer, Bench, lease, plain
from worker.attempts.continuation_planner import Continuations
from worker.core import Claim, Slots
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
        self.answers = list(answers)
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
            self._engine.answer = self.answers.pop(0)
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
            cast(Broker, self.bench.broker), self.policy, self.slots, self.bench.attempts, self.bench.metrics, "eu"
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
        collectors = self.bench.metrics.registry.collectors
        return collectors.get_sample_value("inferq_yields_refused_total", {"model": MODEL, "reason": reason}) or 0.0


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
    """Not for each line."""
    scene = Scene(*(Answer(200, SSE, [said("Once", "stop"), end(1)]) for _ in range(3)), plain(200), plain(200))
    await scene.bench.run(line(), line(), line())
    assert scene.engine.probes == 2


class Silent:
    """An engine that answers chats and never says a token of a prompt; ``asked``: how often it was asked for some."""

    def __init__(self, scene: Scene) -> None:
        self.asked = 0
        self._answers = scene.bench.engine.call
        scene.bench.engine.call = self.call  # type: ignore[method-assign]

    @asynccontextmanager
    async def call(self, call: EngineCall) -> AsyncIterator[EngineAnswer]:
        if call.path == "/tokenize":
            self.asked += 1
            await asyncio.Event().wait()
        async with self._answers(call) as answer:
            yield answer


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning a continuation may take 200 ms, and other attempts wait for 50 ms."""
    monkeypatch.setattr("worker.attempts.continuation_planner.TOKENIZE_LIMIT_S", 0.2)
    monkeypatch.setattr("worker.attempts.continuation_planner.PROBE_WAIT_S", 0.05)


@pytest.mark.usefixtures("impatient")
async def test_an_engine_that_says_no_tokens_holds_up_one_attempt_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait a moment for what it finds out and are asked for plainly. Until it asks again nobody waits."""
    monkeypatch.setattr("worker.attempts.continuation_planner.RETRY_PROBE_S", 0.3)
    scene = Scene(*(plain(200) for _ in range(8)))
    silent = Silent(scene)
    loop = asyncio.get_running_loop()
    async with scene.bench.running(*(line() for _ in range(4))):
        began = loop.time()
        await eventually(lambda: len(scene.engine.asked) == 3, "the others are asked for", every_s=0.01)
        assert loop.time() - began < 0.15
        assert "stream" not in scene.engine.asked[0]
        await eventually(lambda: len(scene.engine.asked) == 4, "so is the one that asked")
        began = loop.time()
        await scene.bench.run(line(), line())
        assert loop.time() - began < 0.1
    assert silent.asked == 1
    await asyncio.sleep(0.3)
    monkeypatch.setattr("worker.attempts.continuation_planner.PROBE_WAIT_S", 10)  # what is known counts meanwhile
    async with scene.bench.running(line(), line()):
        await eventually(lambda: len(scene.engine.asked) == 7, "the other one is asked for", limit_s=0.15, every_s=0.01)
        assert silent.asked == 2


async def test_an_engine_that_stays_silent_is_asked_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as long after each time, at most five minutes; one that answers at last is known to continue."""
    monkeypatch.setattr("worker.attempts.continuation_planner.TOKENIZE_LIMIT_S", 0.001)
    scene, job = Scene(), line().job
    answering = scene.bench.engine.call
    silent, known, pauses = Silent(scene), Continuations(scene.bench.engine), []
    key, loop = (job.model, job.path), asyncio.get_running_loop()
    for _ in range(8):
        assert not await known.can_continue(job)
        pauses.append(round(known._found[key].until - loop.time()))
        known._found[key] = replace(known._found[key], until=loop.time())
    assert pauses == [10, 20, 40, 80, 160, 300, 300, 300]
    assert silent.asked == 8
    scene.bench.engine.call = answering  # type: ignore[method-assign]
    monkeypatch.setattr("worker.attempts.continuation_planner.TOKENIZE_LIMIT_S", 5)
    assert await known.can_continue(job)
    assert known._found[key].silences == 0


@pytest.mark.usefixtures("impatient")
async def test_a_line_that_yielded_begins_anew_on_an_engine_that_says_no_tokens() -> None:
    """Its attempt is not spent on that, and the next one is not held up."""
    scene = Scene(*(Answer(200, SSE, [said("Twice", "stop"), end(1)]) for _ in range(2)))
    silent = Silent(scene)
    await scene.bench.run(line("Once", yields=0))
    assert scene.answer["choices"][0]["message"]["content"] == "Twice"
    began = asyncio.get_running_loop().time()
    await scene.bench.run(line("Once", yields=0))
    assert asyncio.get_running_loop().time() - began < 0.15
    assert silent.asked == 1
    assert not scene.bench.broker.released


@pytest.mark.usefixtures("impatient")
async def test_a_stream_that_somebody_reads_goes_elsewhere_from_an_engine_that_says_no_tokens() -> None:
    """Begun anew it would say something else than what was delivered."""
    scene = Scene()
    Silent(scene)
    job_lease = lease(body=orjson.dumps(orjson.loads(BODY) | {"stream": True}), stream=True, prefix="Once")
    await scene.bench.run(job_lease)
    ((reason, counted),) = scene.bench.broker.released
    assert "did not answer within" in reason
    assert counted


async def test_a_line_yields_with_what_it_said() -> None:
    """Its engine call is closed; the job goes on behind its text, and may yield once less."""
    scene = Scene(Answer(200, SSE, [said("Once"), said(" upon"), asyncio.Event()]))
    job_lease = line()
    async with scene.bench.running(job_lease):
        await eventually(lambda: _text(scene, job_lease) == "Once upon", "it has said something")
        await scene.preemption.ask(job_lease.attempt_id, 0)
        await scene.preemption.ask(job_lease.attempt_id, 0)
    assert scene.bench.engine.left_early == 1
    assert scene.bench.broker.yields == [replace(job_lease.job, prefix="Once upon", yields=1)]
    assert not scene.bench.broker.released
    assert scene.refused("ended") == 1
    await scene.preemption.ask(job_lease.attempt_id, 0)


def _text(scene: Scene, job_lease: Lease) -> str | None:
    attempt = scene.bench.attempts.running(job_lease.attempt_id)
    return attempt.whole.text if attempt is not None and attempt.whole is not None else None


async def test_white_space_at_the_end_is_said_once_more() -> None:
    """Chat templates may strip it off, and no engine would go on behind it."""
    scene = Scene(Answer(200, SSE, [said("Once \n\n"), asyncio.Event()]))
    job_lease = line()
    async with scene.bench.running(job_lease):
        await eventually(lambda: _text(scene, job_lease), "it has said something")
        await scene.preemption.ask(job_lease.attempt_id, 0)
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
        await scene.preemption.ask(job_lease.attempt_id, 0)
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
        await scene.preemption.ask(job_lease.attempt_id, 0)
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
        await scene.preemption.ask(job_lease.attempt_id, 0)
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
        await scene.preemption.ask(job_lease.attempt_id, 0)
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
        await scene.preemption.ask(job_lease.attempt_id, 0)
        assert scene.refused("too_long") == 1
        scene.bench.attempts.abort(job_lease.job.id, "enough")
        gate.set()


async def test_one_that_is_only_starting_yields() -> None:
    """While its engine is asked whether it continues, nothing was said that could be lost."""
    scene = Scene()
    never = asyncio.Event()

    @asynccontextmanager
    async def hangs(_call: EngineCall) -> AsyncIterator[EngineAnswer]:
        await never.wait()
        yield plain(200)

    scene.bench.engine.call = hangs  # type: ignore[method-assign]
    first, second = line("Once"), line()
    async with scene.bench.running(first, second):
        await scene.preemption.ask(first.attempt_id, 0)  # before its first step
        await asyncio.sleep(0)
        await scene.preemption.ask(second.attempt_id, 0)
    assert scene.bench.broker.yields == [replace(one.job, yields=1) for one in (first, second)]
    assert not scene.bench.broker.declined


async def test_the_last_that_can_yields_instead_of_one_that_cannot() -> None:
    """The interactive job is helped all the same; the queue hears which of them runs on."""
    scene = Scene(Answer(200, SSE, [said("Once"), asyncio.Event()]), busy=3)
    scene.slots.total = 3
    able, unable, suspect = line(), line(), replace(line(), suspect=True)
    async with scene.bench.running(able):
        await eventually(lambda: _text(scene, able) == "Once", "it has said something")
        async with asyncio.TaskGroup() as group:
            scene.engine.answers += [Answer(200, SSE, [gate := asyncio.Event(), end(1)]) for _ in range(2)]
            scene.bench.attempts.start([unable, suspect], group)
            await eventually(lambda: len(scene.engine.asked) == 3, "all run")
            refusing = scene.bench.attempts.running(unable.attempt_id)
            assert refusing is not None
            refusing.may_yield = False
            await scene.preemption.ask(unable.attempt_id, 0)
            assert scene.refused("not_continuable") == 1
            assert scene.bench.broker.declined == [False]
            scene.bench.attempts.abort(unable.job.id, "enough")
            scene.bench.attempts.abort(suspect.job.id, "enough")
            gate.set()
    assert scene.bench.broker.yields == [replace(able.job, prefix="Once", yields=1)]


def claim(given_up: int = 0) -> Claim:
    """A claim that asks for slots of which so many were given up for interactive jobs."""
    return Claim(0, 1, 0, 1, (), given_up=given_up)


@pytest.mark.parametrize("brought", [True, False])
async def test_a_claim_under_way_is_waited_for(brought: bool) -> None:
    """If it brings the interactive job, nothing yields; if it brings another line, that job still waits."""
    scene = Scene(Answer(200, SSE, [gate := asyncio.Event(), said("Once", "stop"), end(1)]), busy=0)
    job_lease = line()
    async with scene.bench.running(job_lease):
        await eventually(lambda: scene.engine.asked, "it runs")
        asked = asyncio.create_task(scene.preemption.ask(job_lease.attempt_id, 0))
        await asyncio.sleep(0)
        assert not scene.bench.broker.yields
        scene.slots.busy = 1
        scene.preemption.claimed(claim(), [lease() if brought else line()])
        await asked
        gate.set()
    assert len(scene.bench.broker.yields) == (not brought)
    assert scene.refused("slot_free") == brought


@pytest.mark.parametrize("given_up", [0, 1])
async def test_an_attempt_may_be_asked_before_its_claim_is_answered(given_up: int) -> None:
    """The last to begin is asked first: its claim may be answered after the request to yield."""
    scene = Scene(busy=0)
    job_lease = line()
    scene.slots.ready = True
    scene.slots.assign(Assignment(term=1, version=1, pools=[PoolAssignment(pool=MODEL, shard=0)]))
    scene.slots._shard(0).given_up = given_up
    assert scene.slots.next_claim(0, 0.0)
    async with scene.bench.running(), asyncio.TaskGroup() as group:
        asked = group.create_task(scene.preemption.ask(job_lease.attempt_id, 0))
        await asyncio.sleep(0)
        scene.slots.busy = 1
        scene.preemption.claimed(claim(), [job_lease])
        scene.bench.attempts.start([job_lease], group)
        await asked
    assert scene.bench.broker.yields == [replace(job_lease.job, yields=1)]


@pytest.mark.parametrize(
    ("answered", "brought", "yields"),
    [
        (claim(given_up=1), [lease()], 2),
        (claim(given_up=1), [lease(), lease()], 1),
        (claim(), [lease(model="other"), line()], 2),
        (claim(), [lease(), line()], 1),
        (claim(), [lease(), lease()], 0),
    ],
    ids=["for one that was stopped", "and one more", "of another model", "one of two", "both"],
)
async def test_one_job_is_not_taken_for_another(answered: Claim, brought: list[Lease], yields: int) -> None:
    """Two requests to yield wait for what a claim brings: each interactive job of their model that it brings, beyond
    those that have a slot which was given up, is what one of them is about."""
    scene = Scene(*(Answer(200, SSE, [asyncio.Event()]) for _ in range(2)), busy=2)
    scene.slots.total = 4
    leases = [line(), line()]
    async with scene.bench.running(*leases), asyncio.TaskGroup() as group:
        await eventually(lambda: len(scene.engine.asked) == 2, "both run")
        asked = [group.create_task(scene.preemption.ask(one.attempt_id, 0)) for one in leases]
        await asyncio.sleep(0)
        scene.slots.busy = 4
        scene.preemption.claimed(answered, brought)
        await asyncio.gather(*asked)
        scene.bench.attempts.hand_back()
    assert len(scene.bench.broker.yields) == yields
    assert scene.refused("slot_free") == 2 - yields


async def test_a_slot_that_was_given_up_is_not_free() -> None:
    """A second interactive job that comes before the first has its slot takes one of its own, at once."""
    scene = Scene(*(Answer(200, SSE, [asyncio.Event()]) for _ in range(2)), busy=2)
    scene.slots.total = 2
    leases = [line() for _ in range(2)]
    async with scene.bench.running(*leases):
        await eventually(lambda: len(scene.engine.asked) == 2, "both run")
        for one in leases:
            await scene.preemption.ask(one.attempt_id, 0)
            scene.slots.freed()
            scene.slots.yielded(0)
    assert len(scene.bench.broker.yields) == 2
    assert scene.slots.spare == 0


async def test_a_flood_takes_no_more_than_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 slots, 2 in a second; the others are declined once they have waited for their turn."""
    monkeypatch.setattr("worker.preemption.SHARE_LIMIT_S", 0.1)
    scene = Scene(*(Answer(200, SSE, [asyncio.Event()]) for _ in range(8)), share=0.25, busy=8)
    scene.slots.total = 8
    leases = [line() for _ in range(8)]
    async with scene.bench.running(*leases):
        await eventually(lambda: len(scene.engine.asked) == 8, "all run")
        await asyncio.gather(*(scene.preemption.ask(one.attempt_id, 0) for one in leases))
        assert len(scene.bench.broker.yields) == 2
        assert scene.refused("share") == 6
        assert scene.bench.broker.declined == [True] * 6
        scene.bench.attempts.hand_back()
    assert len(scene.bench.broker.yields) == 2


async def test_beyond_the_share_it_yields_as_soon_as_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless its interactive job has a slot by then."""
    monkeypatch.setattr("scheduling.preemption._WINDOW_S", 0.2)
    scene = Scene(*(Answer(200, SSE, [asyncio.Event()]) for _ in range(3)), share=0.0, busy=3)
    scene.slots.total = 3
    first, second, third = (line() for _ in range(3))
    async with scene.bench.running(first, second, third), asyncio.TaskGroup() as group:
        await eventually(lambda: len(scene.engine.asked) == 3, "all run")
        await scene.preemption.ask(first.attempt_id, 0)
        served = group.create_task(scene.preemption.ask(second.attempt_id, 0))
        await asyncio.sleep(0)
        group.create_task(scene.preemption.ask(third.attempt_id, 0))
        await asyncio.sleep(0)
        scene.preemption.claimed(claim(), [lease()])
        await served
        assert scene.refused("slot_free") == 1
        assert len(scene.bench.broker.yields) == 1
        await eventually(lambda: len(scene.bench.broker.yields) == 2, "the next one may yield")
        scene.bench.attempts.hand_back()
    assert scene.bench.broker.yields == [replace(one.job, yields=1) for one in (first, third)]


async def test_a_report_that_is_lost_is_sent_again() -> None:
    """Until the queue answers."""
    scene = Scene(Answer(200, SSE, [said("Once"), asyncio.Event()]))
    scene.bench.broker.failures = 1
    job_lease = line()
    async with scene.bench.running(job_lease):
        await eventually(lambda: _text(scene, job_lease) == "Once", "it has said something")
        await scene.preemption.ask(job_lease.attempt_id, 0)
    assert len(scene.bench.broker.yields) == 1


async def test_a_job_that_is_cancelled_while_it_yields_is_dropped() -> None:
    """The queue has ended it: whichever comes first, nothing of it is settled."""
    scene = Scene(Answer(200, SSE, [said("Once"), asyncio.Event()]))
    job_lease = line()
    async with scene.bench.running(job_lease):
        await eventually(lambda: _text(scene, job_lease) == "Once", "it has said something")
        scene.bench.attempts.abort(job_lease.job.id, "cancelled")
        await scene.preemption.ask(job_lease.attempt_id, 0)
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
        await scene.preemption.ask(job_lease.attempt_id, 0)
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
