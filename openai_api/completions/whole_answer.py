"""Compose the whole answer of a chat or text completion from its stream, as the engine would have given it unstreamed.

For workers, which ask for a stream where a job may yield: what was said until then is the text behind which it goes on.
The fields are those of OpenAI's API reference and of vLLM (``vllm/entrypoints/openai``): text, reasoning and whatever
else a stream's ``delta`` holds come together in ``message``; what a chunk says beside its choices is the answer's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from ..engine_errors import facts_of_refusal
from ..paths import CHAT_PATH
from ..sse import DONE, event_data, split_events

FOLD_BYTES = 64 * 1024
"""So much of a stream is kept unread: an event of one token is some 250 bytes for some 4 of text."""
MAX_PREFIX_BYTES = 256 * 1024
"""What was said may be so long if a job is to go on behind it: it travels in its envelope."""
_TEXT = "content"


def streamed(body: bytes) -> bytes:
    """The request in ``body`` (a JSON object) as one for a stream that ends with its usage."""
    request = orjson.loads(body)
    return orjson.dumps(request | {"stream": True, "stream_options": {"include_usage": True}})


class WholeAnswer:
    """The answer to a request of ``path`` with one choice. ``prefix`` is what was said before its stream began.

    Pass the stream's bytes to :meth:`add` as they arrive. All else is about what was added so far.
    """

    __slots__ = (
        "_chat",
        "_choice",
        "_done",
        "_failure",
        "_fields",
        "_names_finish",
        "_pieces",
        "_raw",
        "_raw_size",
        "_said_size",
        "_usage",
    )

    def __init__(self, path: str, prefix: str = "") -> None:
        self._chat = path == CHAT_PATH
        self._pieces: dict[str, list[str]] = {_TEXT: [prefix]} if prefix else {}
        self._raw: list[bytes] = []
        self._raw_size = 0
        self._said_size = len(prefix)
        self._fields: dict[str, Any] = {}
        self._choice: dict[str, Any] = {}
        self._usage: Any = None
        self._done = False
        self._names_finish = False
        self._failure: tuple[int, bytes] | None = None

    def add(self, data: bytes) -> None:
        """``data`` has arrived."""
        self._raw.append(data)
        self._raw_size += len(data)
        if self._raw_size > FOLD_BYTES:
            self._fold()

    @property
    def size(self) -> int:
        """Bytes of its text and reasoning, roughly, and of what was not read yet."""
        return self._raw_size + self._said_size

    @property
    def failure(self) -> tuple[int, bytes] | None:
        """The status and body of the error that ended the stream; None if none did."""
        self._fold()
        return self._failure

    @property
    def text(self) -> str | None:
        """The text behind which another attempt may go on; None if there is none: it has come to its end, or there is
        more than plain text."""
        self._fold()
        if self._done or self._failure or self._choice.get("finish_reason") or self._pieces.keys() - {_TEXT}:
            return None
        return "".join(self._pieces.get(_TEXT, ()))

    @property
    def is_complete(self) -> bool:
        """Whether all of it was said: the choice has a finish reason, and the usage has come or the end marker. An
        engine that names no finish reasons ends with the marker alone."""
        self._fold()
        if self._choice.get("finish_reason"):
            return self._done or self._usage is not None
        return self._done and not self._names_finish and bool(self._fields)

    def body(self) -> bytes:
        """The answer as JSON."""
        self._fold()
        texts = {name: "".join(pieces) for name, pieces in self._pieces.items()}
        choice = {"index": 0} | self._choice
        finish = choice.pop("finish_reason", None) or "stop"
        said = choice.pop("delta", {})
        if self._chat:
            message = {"role": "assistant", "content": None, "refusal": None, "tool_calls": []} | said | texts
            choice["message"] = message
        else:
            choice["text"] = texts.get(_TEXT, "")
        choice = {"logprobs": None} | choice | {"finish_reason": finish}
        kind = "chat.completion" if self._chat else "text_completion"
        answer = self._fields | {"object": kind, "choices": [choice]}
        return orjson.dumps(answer if self._usage is None else answer | {"usage": self._usage})

    def _fold(self) -> None:
        """Read the events that are whole by now."""
        if not self._raw:
            return
        raw = b"".join(self._raw)
        held = b"\r" if raw.endswith(b"\r") else b""  # the LF behind it may still come
        text = raw.removesuffix(held).replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in raw else raw
        border = text.rfind(b"\n\n") + 2
        whole, rest = (text[:border], text[border:]) if border > 1 else (b"", text)
        self._raw = [rest + held] if rest or held else []
        self._raw_size = len(rest) + len(held)
        for event in split_events(whole.removeprefix(b"\xef\xbb\xbf")):
            self._take(event_data(event))

    def _take(self, data: bytes) -> None:
        if data == DONE:
            self._done = True
        if not data or data == DONE or self._failure is not None:
            return
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            chunk = None
        if type(chunk) is not dict or chunk.get("error") or type(chunk.get("choices")) is not list:
            self._failure = (facts_of_refusal(502, data).status, data)
            return
        for name, value in chunk.items():
            if name == "usage":
                self._usage = value or self._usage
            elif name != "choices" and (value is not None or name not in self._fields):
                self._fields[name] = value
        for choice in chunk["choices"]:
            self._add(choice)

    def _add(self, choice: Mapping[str, Any]) -> None:
        self._names_finish = self._names_finish or "finish_reason" in choice
        said = choice.get("delta") or {} if self._chat else {_TEXT: choice.get("text")}
        for name, value in said.items():
            if name != "role" and type(value) is str and (value or name == _TEXT):
                self._pieces.setdefault(name, []).append(value)
                self._said_size += len(value)
            elif value:
                self._choice.setdefault("delta", {})[name] = value
        for name, value in choice.items():
            if name not in ("delta", "text") and (value is not None or name not in self._choice):
                self._choice[name] = value
