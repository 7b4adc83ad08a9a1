"""Going on behind what was delivered: what the engine is asked for, and what its answer becomes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from queue_schemas import EngineState, Job
from tests.support.queue import make_job
from worker.attempts.continuation_planner import plan_continuation
from worker.core import Continuation
from worker.engines import EngineCall, NotContinuable
from worker.engines.dialects import VLLM
from worker.engines.simulated import SimulatedEngine, SimulationSettings

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def job_of(fields: dict[str, Any], prefix: str = "", path: str = CHAT) -> Job:
    """A stream on the simulated model."""
    fields = {"model": "sim", "stream": True, "stream_options": {"include_usage": True}} | fields
    return make_job(model="sim", path=path, body=orjson.dumps(fields), stream=True, prefix=prefix)


def ask(text: str = "Tell me.", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


async def engine_of(**options: Any) -> SimulatedEngine:
    """A simulated engine that takes no time."""
    engine = SimulatedEngine(SimulationSettings(ttft_ms=0, prefill_us_per_token=0, tokens_per_s=0, **options))
    await engine._start()
    assert engine.state is EngineState.READY
    return engine


async def answer_of(engine: SimulatedEngine, job: Job, body: bytes | None = None) -> bytes:
    async with engine.call(EngineCall(job.path, body or job.body)) as answer:
        assert answer.status == 200
        return await answer.read(1 << 20)


async def rest_of(engine: SimulatedEngine, job: Job) -> bytes:
    """What a worker passes on of a continued attempt."""
    plan = await plan_continuation(engine, job)
    if plan.body is None:
        return plan.ending(7)
    return plan.feed(await answer_of(engine, job, plan.body)) + plan.end()


def said(stream: bytes) -> tuple[str, str, dict[str, Any]]:
    """Text, finish reason and usage of a stream."""
    *chunks, done = [event.removeprefix(b"data: ") for event in stream.split(b"\n\n") if event]
    assert done == b"[DONE]"
    text, finish, usage = "", "", {}
    for chunk in map(orjson.loads, chunks):
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            text += choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
            finish = choice["finish_reason"] or finish
    return text, finish, usage


@pytest.mark.parametrize("mode", ["text", "echo"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("limits", [{}, {"max_tokens": 9}, {"max_tokens": 500, "min_tokens": 3}])
async def test_any_cut_goes_on_as_if_nothing_had_happened(mode: Any, path: str, limits: dict[str, int]) -> None:
    """Text, finish reason and usage of the two parts are those of the uninterrupted answer."""
    engine = await engine_of(mode=mode, answer_tokens=14)
    question = "A question of forty characters and more, to be echoed."
    fields = ({"prompt": question} if path == COMPLETIONS else ask(question)) | limits
    text, finish, usage = said(await answer_of(engine, job_of(fields, path=path)))
    for cut in range(4, len(text) + 1, 4):
        rest, end, whole = said(await rest_of(engine, job_of(fields, text[:cut], path)))
        assert (text[:cut] + rest, end) == (text, finish)
        assert {name: whole[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
            name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        }


async def test_a_limit_that_is_reached_ends_without_the_engine() -> None:
    """Everything allowed was delivered, only its end is missing."""
    engine = await engine_of(answer_tokens=40)
    text, _, _ = said(await answer_of(engine, job_of(ask(max_tokens=5))))
    plan = await plan_continuation(engine, job_of(ask(max_tokens=5), text))
    assert plan.body is None
    rest, finish, usage = said(plan.ending(7))
    assert (rest, finish, usage["completion_tokens"]) == ("", "length", 5)
    bare = job_of(ask(max_tokens=5, stream_options=None), text)
    assert said((await plan_continuation(engine, bare)).ending(7)) == ("", "length", {})


async def test_a_completion_without_a_limit_has_the_usual_one() -> None:
    """Sixteen tokens are for the whole answer, not for each attempt."""
    engine = await engine_of(answer_tokens=200)
    text, finish, _ = said(await answer_of(engine, job_of({"prompt": "Once"}, path=COMPLETIONS)))
    assert (len(text), finish) == (64, "length")
    rest, end, _ = said(await rest_of(engine, job_of({"prompt": "Once"}, text[:24], COMPLETIONS)))
    assert (text[:24] + rest, end) == (text, "length")


async def test_a_stop_string_ends_a_continued_answer_where_it_would_have_ended() -> None:
    """What is delivered never holds a part of a stop string."""
    engine = await engine_of(answer_tokens=30)
    text, _, _ = said(await answer_of(engine, job_of(ask())))
    stop = text[38:44]
    cut, finish, _ = said(await answer_of(engine, job_of(ask(stop=stop))))
    assert (cut, finish) == (text[:38], "stop")
    rest, end, _ = said(await rest_of(engine, job_of(ask(stop=stop), text[:36])))
    assert (text[:36] + rest, end) == (text[:38], "stop")


@pytest.mark.parametrize(
    ("options", "prefix"),
    [({"template_trims": True}, "ends in a space "), ({"tokenizes": False}, "whatever")],
    ids=["a template that trims", "no tokenizer"],
)
async def test_an_engine_that_cannot_truthfully_go_on_is_found_out(options: dict[str, bool], prefix: str) -> None:
    """It would read another text than the client has, or nothing shows that it does not."""
    engine = await engine_of(**options)
    with pytest.raises(NotContinuable):
        await plan_continuation(engine, job_of(ask(), prefix))


class Decorating:
    """An engine whose chat template puts ``before`` in front of an answer that is to begin, or that is to go on."""

    dialect = VLLM

    def __init__(self, engine: SimulatedEngine, *, goes_on: bool, before: str) -> None:
        self._engine = engine
        self._goes_on = goes_on
        self._before = before

    def call(self, call: EngineCall) -> Any:
        fields = orjson.loads(call.body)
        if "messages" in fields and bool(fields.get("continue_final_message")) is self._goes_on:
            place = -1 if self._goes_on else len(fields["messages"])
            role, text = ("assistant", fields["messages"][-1]["content"]) if self._goes_on else ("thoughts", "")
            fields["messages"][place:] = [{"role": role, "content": self._before + text}]
        return self._engine.call(replace(call, body=orjson.dumps(fields)))


@pytest.mark.parametrize("goes_on", [True, False], ids=["in front of what goes on", "only in front of a new answer"])
@pytest.mark.parametrize("before", ["<think>", "<think>" * 20])
async def test_a_template_that_decorates_answers_is_found_out(goes_on: bool, before: str) -> None:
    """The model would read another beginning of its answer than it had, and the usage would count it."""
    engine: Any = Decorating(await engine_of(), goes_on=goes_on, before=before)
    with pytest.raises(NotContinuable):
        await plan_continuation(engine, job_of(ask(), "Once upon a time. " * 20))


def test_the_engine_counts_the_prompt() -> None:
    """What an image is made of is not among the tokens of the text."""
    plan = Continuation(job_of(ask(), "x"), b"", prompt_tokens=10, said_tokens=5)
    told = {"prompt_tokens": 300, "completion_tokens": 2, "total_tokens": 302}
    out = plan.feed(b"data: " + orjson.dumps({"choices": [], "usage": told}) + b"\n\n")
    assert orjson.loads(out.removeprefix(b"data: "))["usage"] == {
        "prompt_tokens": 295, "completion_tokens": 7, "total_tokens": 302
    }  # fmt: skip


async def test_the_request_keeps_all_that_it_does_not_change() -> None:
    """Parameters pass as they came; the prefix is the assistant's last message."""
    engine = await engine_of()
    job = job_of(ask(temperature=0.5, max_completion_tokens=100, sim={"on": "x", "fail": "hang"}), "Once")
    plan = await plan_continuation(engine, job)
    assert plan.body is not None
    assert orjson.loads(plan.body) == orjson.loads(job.body) | {
        "messages": [*ask()["messages"], {"role": "assistant", "content": "Once"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
        "max_completion_tokens": 99,
    }


USAGE = {
    "prompt_tokens": 15,
    "completion_tokens": 2,
    "total_tokens": 17,
    "prompt_tokens_details": {"cached_tokens": 14},
}


@settings(max_examples=100, deadline=None)
@given(cuts=st.lists(st.integers(0, 400), max_size=8), crlf=st.booleans())
def test_the_usage_is_put_right_however_the_bytes_are_cut(cuts: list[int], crlf: bool) -> None:
    """Only events that tell it are changed; every byte of the others passes."""
    other = b'data: {"choices":[{"index":0,"delta":{"content":"usage is a word"}}]}\n\n'
    told = b"data: " + orjson.dumps({"choices": [], "usage": USAGE}) + b"\n\n"
    stream = other + told + b": usage\n\n" + b'data: {"usage": broken\n\n' + b"data: [DONE]\n\n"
    plan = Continuation(job_of(ask(), "x"), b"", prompt_tokens=10, said_tokens=5)
    data = stream.replace(b"\n", b"\r\n") if crlf else stream
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    out = b"".join(plan.feed(data[a:b]) for a, b in itertools.pairwise(places)) + plan.end()
    whole = {
        "prompt_tokens": 10, "completion_tokens": 7, "total_tokens": 17, "prompt_tokens_details": {"cached_tokens": 10}
    }  # fmt: skip
    right = stream.replace(orjson.dumps(USAGE), orjson.dumps(whole))
    assert out.replace(b"\r\n", b"\n") == right
