"""Reading the events of completions whose attempts are to be compared."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from queue_schemas import StreamBroken
from queue_schemas.transcript import read_chunk

GOOD = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "Hi"}}]}


def test_a_chunk_is_read() -> None:
    """What the others differ from."""
    assert read_chunk(orjson.dumps(GOOD)) == GOOD


@pytest.mark.parametrize("value", [[], {}, [["chat.completion.chunk"]], 1, None, True, "chat"])
@pytest.mark.parametrize("field", ["object", "choices"])
def test_events_that_are_no_chunks_cannot_be_compared(field: str, value: Any) -> None:
    """[H50] Whatever stands where the kind and the choices belong, also what cannot be looked up in a set."""
    if field == "choices" and value == []:
        assert read_chunk(orjson.dumps(GOOD | {field: value}))["choices"] == []
        return
    with pytest.raises(StreamBroken):
        read_chunk(orjson.dumps(GOOD | {field: value}))


@pytest.mark.parametrize("choice", [[], {}, {"index": "0"}, {"index": []}, {"index": 0, "more": {}}, None])
def test_choices_that_cannot_be_told_apart_cannot_be_compared(choice: Any) -> None:
    """A choice without its number, or with what no attempt could repeat."""
    with pytest.raises(StreamBroken):
        read_chunk(orjson.dumps(GOOD | {"choices": [choice]}))
