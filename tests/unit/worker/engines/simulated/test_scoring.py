"""The simulated engine on paths of models that score, sort, label and hear."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from worker.engines.simulated.api.wire import Reply
from worker.engines.simulated.settings import SimulationSettings
from worker.engines.simulated.simulation import Simulation


def ask(path: str, fields: Any) -> tuple[int, Any]:
    body = fields if isinstance(fields, bytes) else orjson.dumps(fields)
    reply = Simulation(SimulationSettings(models=("m",))).open("POST", path, body)
    assert isinstance(reply, Reply)
    return reply.status, orjson.loads(reply.body)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_are_sorted_by_how_well_they_answer(path: str) -> None:
    """[F2] The best first, with its place in the request; ``top_n`` cuts."""
    documents = ["bread", "the capital of France is Paris", {"text": "cheese"}]
    status, found = ask(path, {"query": "capital of France", "documents": documents, "top_n": 2})
    assert status == 200
    assert found["results"][0]["index"] == 1
    scores = [one["relevance_score"] for one in found["results"]]
    assert len(scores) == 2 and scores == sorted(scores, reverse=True)


def test_texts_are_scored_labelled_and_pooled() -> None:
    """[F2] One entry for each input, the same each time."""
    for path, fields in (
        ("/score", {"text_1": "a", "text_2": ["a", "b"]}),
        ("/v1/score", {"queries": ["a", "b"], "documents": ["a", "b"]}),
        ("/classify", {"input": ["a", "b"]}),
        ("/pooling", {"input": ["a", "b"]}),
    ):
        status, found = ask(path, fields)
        assert (status, [one["index"] for one in found["data"]]) == (200, [0, 1])
        assert ask(path, fields) == (status, found)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/rerank", {"query": "a"}),
        ("/rerank", {"query": 1, "documents": ["a"]}),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}),
        ("/classify", {"input": []}),
        ("/pooling", {"input": [1]}),
        ("/v1/messages/count_tokens", {"messages": "a"}),
        ("/classify", {"input": "a", "model": "other"}),
    ],
)
def test_what_is_missing_is_refused(path: str, fields: dict[str, Any]) -> None:
    """[F2] With an error object, as vLLM does."""
    status, found = ask(path, fields)
    assert status in (400, 404)
    assert found["error"]["message"]


def test_a_conversation_and_a_recording_are_answered() -> None:
    """[F2] Tokens of all that is said; a text about the form."""
    messages = [{"role": "user", "content": [{"type": "text", "text": "hello world"}]}]
    fewer = ask("/v1/messages/count_tokens", {"messages": messages})[1]["input_tokens"]
    more = ask("/v1/messages/count_tokens", {"messages": messages, "system": "be kind"})[1]["input_tokens"]
    assert 0 < fewer < more
    form = b'--B\r\ncontent-disposition: form-data; name="model"\r\n\r\nm\r\n--B--\r\n'
    assert ask("/v1/audio/translations", form)[1]["text"]
    assert ask("/v1/audio/transcriptions", form.replace(b"\r\nm\r\n", b"\r\nother\r\n"))[0] == 404


@pytest.mark.parametrize("model_first", [True, False])
def test_the_model_of_a_form_is_the_field_of_that_name(model_first: bool) -> None:
    """[H10] The field named model is read, not the part behind it: the openai SDK sends the recording last."""
    parts = [
        b'Content-Disposition: form-data; name="model"\r\n\r\nm',
        b'Content-Disposition: form-data; name="language"\r\nContent-Type: text/plain\r\n\r\nen',
        b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\nRIFF\0',
    ]
    form = b"".join(b"--B\r\n" + part + b"\r\n" for part in (parts if model_first else parts[::-1])) + b"--B--\r\n"
    for path in ("/v1/audio/transcriptions", "/v1/audio/translations"):
        assert ask(path, form)[0] == 200
        assert ask(path, form.replace(b"\r\n\r\nm\r\n", b"\r\n\r\nother\r\n"))[0] == 404
