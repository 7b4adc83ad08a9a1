"""Whole answers composed of streams: what the engine would have answered without one."""

from __future__ import annotations

import random
import time
from typing import Any

import orjson
import pytest

from openai_api.completions.whole_answer import FOLD_BYTES, WholeAnswer, streamed
from openai_api.sse import DONE_EVENT, encode_json

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USAGE = {"prompt_tokens": 5, "total_tokens": 8, "completion_tokens": 3, "prompt_tokens_details": None}


def vllm_chat(*pieces: str, finish: str | None = "stop", usage: bool = True) -> list[bytes]:
    """The events of a chat as vLLM 0.11 streams it."""
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 17, "model": "m"}

    def choice(delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, "token_ids": None} | more

    chunks = [base | {"choices": [choice({"role": "assistant", "content": ""})], "prompt_token_ids": None}]
    chunks += [base | {"choices": [choice({"content": piece})]} for piece in pieces]
    if finish:
        chunks[-1]["choices"][0] |= {"finish_reason": finish, "stop_reason": None}  # type: ignore[index]
    if usage:
        chunks.append(base | {"choices": [], "usage": USAGE})
    return [*map(encode_json, chunks), *([DONE_EVENT] if finish else [])]


VLLM_CHAT = {
    "id": "chatcmpl-1", "object": "chat.completion", "created": 17, "model": "m",
    "choices": [{
        "index": 0,
        "message": {"role": "assistant", "content": "Once upon a", "refusal": None, "annotations": None, "audio": None,
                    "function_call": None, "tool_calls": [], "reasoning_content": None},
        "logprobs": None, "finish_reason": "stop", "stop_reason": None, "token_ids": None,
    }],
    "service_tier": None, "system_fingerprint": None, "usage": USAGE,
    "prompt_logprobs": None, "prompt_token_ids": None, "kv_transfer_params": None,
}  # fmt: skip
"""The same as vLLM answers it unstreamed."""


def without_nulls(value: Any) -> Any:
    """``value`` but for what is null in it: clients read a missing field as null."""
    if isinstance(value, dict):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_it_is_the_plain_answer_however_it_is_cut(line_end: bytes) -> None:
    """Into bytes, into pieces, with any line ends."""
    stream = b"".join(vllm_chat("Once", " upon", " a")).replace(b"\n", line_end)
    for seed in range(30):
        cuts = sorted(random.Random(seed).sample(range(1, len(stream)), 12)) if seed else range(1, len(stream))
        whole, before = WholeAnswer(CHAT), 0
        for cut in [*cuts, len(stream)]:
            whole.add(stream[before:cut])
            before = cut
        assert whole.is_complete
        assert without_nulls(orjson.loads(whole.body())) == without_nulls(VLLM_CHAT)


def test_what_was_said_before_comes_first() -> None:
    """The rest of an answer behind what an earlier attempt said."""
    whole = WholeAnswer(CHAT, "Once upon")
    assert whole.text == "Once upon"
    for event in vllm_chat(" a"):
        whole.add(event)
    assert orjson.loads(whole.body())["choices"][0]["message"]["content"] == "Once upon a"


def test_a_text_completion() -> None:
    """Its choice has a text in the place of a message."""
    base = {"id": "cmpl-1", "object": "text_completion", "created": 17, "model": "m"}
    chunks: list[dict[str, Any]] = [
        base | {"choices": [{"index": 0, "text": piece, "logprobs": None, "finish_reason": None, "stop_reason": None}]}
        for piece in ("Once", " upon")
    ]
    chunks[-1]["choices"][0]["finish_reason"] = "length"
    whole = WholeAnswer(COMPLETIONS)
    for chunk in [*chunks, base | {"choices": [], "usage": USAGE}]:
        whole.add(encode_json(chunk))
    choice = {"index": 0, "text": "Once upon", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    assert orjson.loads(whole.body()) == base | {"choices": [choice], "usage": USAGE}


def test_an_answer_is_complete_with_its_end() -> None:
    """A finish reason, and the usage or the marker; a stream that breaks before has no answer, but a text."""
    events = vllm_chat("Once", " upon", " a")
    whole = WholeAnswer(CHAT)
    for number, event in enumerate(events):
        assert whole.is_complete is (number > 4)
        assert whole.text == (None if number > 3 else ["", "", "Once", "Once upon"][number])
        whole.add(event)
    assert whole.is_complete
    interrupted = WholeAnswer(CHAT)
    for event in [*vllm_chat("Once", finish=None, usage=False), DONE_EVENT]:
        interrupted.add(event)
    assert not interrupted.is_complete


def test_an_error_within_the_stream_is_the_answer() -> None:
    """With its status and its body, as if nothing had been streamed."""
    error = {"error": {"message": "no room", "type": "InternalServerError", "param": None, "code": 503}}
    whole = WholeAnswer(CHAT)
    for event in [*vllm_chat("Once", finish=None, usage=False), encode_json(error), DONE_EVENT]:
        whole.add(event)
    assert whole.failure == (503, orjson.dumps(error))
    assert whole.text is None


def test_thoughts_come_in_the_message_and_cannot_go_on() -> None:
    """Their state is not in the text."""
    base = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    whole = WholeAnswer(CHAT)
    for delta in ({"role": "assistant", "content": ""}, {"reasoning": "Hm"}, {"reasoning": "m"}, {"content": "Yes"}):
        whole.add(encode_json(base | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}))
    assert whole.text is None
    end = {"index": 0, "delta": {}, "finish_reason": "stop"}
    whole.add(encode_json(base | {"choices": [end]}) + DONE_EVENT)
    message = orjson.loads(whole.body())["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == ("Yes", "Hmm")


def test_a_long_stream_takes_little_room() -> None:
    """Its events are some 250 bytes a token."""
    whole = WholeAnswer(CHAT)
    (_, piece, *_) = vllm_chat("word", finish=None)
    for _ in range(10_000):
        whole.add(piece)
        assert whole.size < FOLD_BYTES + len(piece) + 4 * 10_000
    assert whole.text == "word" * 10_000


def test_a_request_is_asked_as_a_stream_with_usage() -> None:
    """All else stays."""
    request = {"model": "m", "stream": False, "max_tokens": 5}
    assert orjson.loads(streamed(orjson.dumps(request))) == {
        "model": "m", "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def test_reasoning_counts_for_the_size_of_an_answer() -> None:
    """It is kept like text: an engine that thinks without an end must not fill its worker's memory."""
    whole = WholeAnswer(CHAT, "before")
    thought = encode_json({"choices": [{"index": 0, "delta": {"reasoning_content": "hm " * 100}}]})
    for _ in range(1_000):
        whole.add(thought)
    assert whole.text is None
    assert 300_000 <= whole.size < 300_000 + FOLD_BYTES


def test_a_long_answer_costs_no_more_for_each_piece() -> None:
    """Its size is asked for with each: 32,000 took 8 s where all pieces before were looked at again."""
    whole, piece = WholeAnswer(CHAT), encode_json({"choices": [{"index": 0, "delta": {"content": "word "}}]})
    began = time.process_time()
    for _ in range(32_000):
        whole.add(piece)
        assert whole.size > 0
    assert time.process_time() - began < 2.0
