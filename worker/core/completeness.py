"""Decide whether an engine's answer is complete, or was cut short.

Used by :mod:`worker.attempts` when an answer ends without an error of the transport. A connection that is closed looks
the same whether the engine had finished or was killed, so an answer that nothing else proves complete counts as lost.

Rules:

* A stream is complete once its API's own end marker was seen: ``data: [DONE]`` for chat and text completions,
  ``message_stop`` for ``/v1/messages``, ``response.completed``, ``response.failed`` or ``response.incomplete`` for
  ``/v1/responses``. An error event that the engine sent last ends a stream as well: it is reported to the client.
* Some engines send no ``[DONE]``. A stream of completions is complete without it when every choice that was asked for
  has a finish reason, and the usage has come if it was asked for. ``[DONE]`` is then added, because many clients wait
  for it.
* ``[DONE]`` from an engine that names finish reasons, before it has named any, ends no answer: llama-cpp-python's
  server sends it when another request interrupts a stream. It is kept from the client: the stream was cut short.
* A stream of another path has no marker that is known: it is complete if length or chunks delimit it.
* A plain answer is complete if length or chunks delimit it, or if it is a JSON object or array. An error answer always
  is: however short, it does not pass for a success.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Any

import orjson

from openai_api.paths import wants_usage
from openai_api.sse import DONE, DONE_EVENT, event_data, split_events

_DONE_LINE = re.compile(rb"^data: *\[DONE\]", re.MULTILINE)
_MESSAGES_END = re.compile(rb'"type"\s*:\s*"message_stop"')
_RESPONSES_END = re.compile(rb'"type"\s*:\s*"response\.(?:completed|failed|incomplete|cancelled)"')


class _Api(Enum):
    COMPLETIONS = auto()
    MESSAGES = auto()
    RESPONSES = auto()
    OTHER = auto()


_JSON_ENDS = {(b"{", b"}"), (b"[", b"]"), (b'"', b'"')}
_SHORT_BYTES = 64
_MARKERS = {_Api.MESSAGES: _MESSAGES_END, _Api.RESPONSES: _RESPONSES_END}


class StreamEnd:
    """Watches one stream for its end. Pass whole events through :meth:`feed`; their line ends are LF."""

    __slots__ = ("_api", "_before", "_finishing", "_interrupted", "_last", "_marked", "_marker")

    def __init__(self, path: str) -> None:
        self._api = _api_of(path)
        self._marker = _MARKERS.get(self._api)
        """Of an API that ends with an event of its own; None: ``[DONE]`` ends the stream."""
        self._marked = False
        self._interrupted = False
        self._last = b""
        self._before = b""
        self._finishing: list[bytes] = []
        """Events that carry a finish reason, and those behind them that carry usage: read only if no marker comes."""

    def feed(self, events: bytes) -> bytes:
        """What may be passed on of ``events``: all but the end marker of a stream that was interrupted."""
        # A JSON string holds no bare quote or line end, so no text of a model matches what is looked for here.
        self._before = self._last
        self._last = events
        if self._marker is not None:
            self._marked = self._marked or self._marker.search(events) is not None
            return events
        # For every event of every stream: ``rfind`` takes a quarter of the time of ``in``.
        find = events.rfind
        if (
            find(b'"finish_reason":"') >= 0
            or find(b'"finish_reason": "') >= 0
            or (self._finishing and find(b'"usage"') >= 0)
        ):
            self._finishing.append(events)
        if find(b"[DONE]") >= 0 and (done := _DONE_LINE.search(events)):
            said = events[: done.start()]
            if not self._finishing and b'"finish_reason"' in (said or self._before) and not self._failed(said):
                self._interrupted = True
                return said
            self._marked = True
        return events

    def missing_end(self, tail: bytes, body: bytes, *, delimited: bool) -> bytes | None:
        """What to add to the stream, which has ended, so that it is complete; None if it was cut short.

        ``tail`` is what came behind the last whole event, ``body`` the request's; ``delimited``: length or chunks said
        where the answer ends.
        """
        rest = b""
        if _is_event(tail) or (tail and delimited and self._api is _Api.OTHER):
            # Only the blank line behind it is missing, without which no client would see it.
            rest = self.feed(tail.rstrip(b"\n") + b"\n\n")
        if self._interrupted:
            return None
        if self._marked or self._failed(self._last):
            return rest
        if self._api is _Api.OTHER:
            return rest if delimited else None
        if self._api is _Api.COMPLETIONS and self._finished(body):
            return rest + DONE_EVENT
        return None

    def _failed(self, last: bytes) -> bool:
        """Whether the engine reported an error at the end, perhaps before a comment."""
        return _is_error(last) or ((not last or last.startswith(b":")) and _is_error(self._before))

    def _finished(self, body: bytes) -> bool:
        finished: set[int] = set()
        usage = False
        for event in split_events(b"".join(self._finishing)):
            chunk = _json(event_data(event))
            choices = chunk.get("choices") if isinstance(chunk, dict) else None
            if not isinstance(chunk, dict) or not isinstance(choices, list):
                continue
            usage = usage or bool(chunk.get("usage"))
            finished.update(
                choice["index"] if type(choice.get("index")) is int else 0
                for choice in choices
                if isinstance(choice, dict) and choice.get("finish_reason")
            )
        request = _json(body)
        asked: dict[str, Any] = request if isinstance(request, dict) else {}
        return len(finished) >= _choices(asked) and (usage or not wants_usage(asked))


def is_complete(status: int, content_type: str, body: bytes, *, delimited: bool) -> bool:
    """Whether a plain answer is all that the engine had to say."""
    if delimited or status >= 400:
        return True
    if "json" not in content_type.lower():
        return False
    return isinstance(_json(body), dict | list)


def is_readable(status: int, content_type: str, body: bytes) -> bool:
    """Whether a plain answer that passes for a success can be what its content type says: for JSON, a look at both ends
    is enough to tell an empty body or a text, and costs nothing with large ones."""
    if not 200 <= status < 300 or "json" not in content_type.lower():
        return True
    if len(body) <= _SHORT_BYTES:
        return _is_json(body)
    return (body[:_SHORT_BYTES].lstrip()[:1], body[-_SHORT_BYTES:].rstrip()[-1:]) in _JSON_ENDS


def _api_of(path: str) -> _Api:
    match path.rstrip("/").rpartition("/")[2]:
        case "completions":
            return _Api.COMPLETIONS
        case "messages":
            return _Api.MESSAGES
        case "responses":
            return _Api.RESPONSES
        case _:
            return _Api.OTHER


def _choices(request: dict[str, Any]) -> int:
    """How many choices ``request`` asks for."""
    n, prompt = request.get("n"), request.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    return prompts * (n if type(n) is int and n > 0 else 1)


def _is_event(tail: bytes) -> bool:
    """Whether ``tail`` is an event of which nothing but the blank line is missing."""
    data = event_data(tail)
    return data == DONE or isinstance(_json(data), dict | list)


def _is_error(events: bytes) -> bool:
    """Whether the last of ``events`` reports an error: in OpenAI's form, Anthropic's, or that of older vLLM."""
    if b'"error"' not in events:
        return False
    said = [data for event in split_events(events) if (data := event_data(event))]
    last = _json(said[-1]) if said else None
    return isinstance(last, dict) and (
        bool(last.get("error")) or last.get("type") == "error" or last.get("object") == "error"
    )


def _is_json(data: bytes) -> bool:
    try:
        orjson.loads(data)
    except orjson.JSONDecodeError:
        return False
    return True


def _json(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
