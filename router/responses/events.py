"""Builds a response and its numbered events: a pure function of the request and of the frames of its chat.

Rules:

* Events are numbered from 0 without a gap. The same frames give the same events, in whichever pieces they come, so any
  Router can send any of them again.
* An item opens with its first content and closes when another kind begins, or with the answer. Function calls stay open
  until then, as their arguments may come interleaved.
* Roles and empty text make no event: an attempt that continues another one leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from openai_api.chat_chunks import ChatFailure, ChatReader
from openai_api.response_jobs import ResponseStatus, finish_of, status_of_finish
from queue_schemas import HEAD, Frame

from .json_fields import Json
from .schemas import (
    ResponseRequest,
    call_item,
    item_id,
    message_item,
    reasoning_item,
    reasoning_part,
    refusal_part,
    response_error,
    response_logprobs,
    response_object,
    response_usage,
    text_part,
)

_BROKEN_OFF = "the engine's answer broke off before its end; send the request again"


@dataclass(slots=True)
class _Part:
    """One part of an item that is being built. ``name`` is the middle of its events' types."""

    name: str
    make: Callable[..., Json]
    pieces: list[str] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)

    @property
    def text(self) -> str:
        if len(self.pieces) > 1:
            self.pieces[:] = ["".join(self.pieces)]
        return self.pieces[0] if self.pieces else ""

    def as_json(self) -> Json:
        return self.make(self.text, self.logprobs) if self.name == "output_text" else self.make(self.text)


_PARTS: dict[str, Callable[..., Json]] = {
    "output_text": text_part,
    "refusal": refusal_part,
    "reasoning_text": reasoning_part,
}


@dataclass(slots=True)
class _Item:
    """One item that is being built: of parts, or a call of ``function``."""

    kind: str
    place: int
    name: str
    parts: list[_Part] = field(default_factory=list)
    call_id: str = ""
    function: str = ""
    arguments: list[str] = field(default_factory=list)
    status: str = "in_progress"

    def as_json(self) -> Json:
        if self.kind == "function_call":
            return call_item(self.name, self.status, self.call_id, self.function, "".join(self.arguments))
        make = message_item if self.kind == "message" else reasoning_item
        return make(self.name, self.status, [part.as_json() for part in self.parts])


class ResponseEvents:
    """One response. Feed it frames, or end it without (:meth:`fail`, :meth:`cancel`); each call returns the events that
    follow. ``status`` is the response's; ``over``: it is final."""

    def __init__(self, request: ResponseRequest) -> None:
        self.status: ResponseStatus = "queued" if request.background else "in_progress"
        self._request = request
        self._reader = ChatReader()
        self._events: list[Json] = []
        self._number = 0
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._calls: dict[int, _Item] = {}
        self._finish: object = None
        self._usage: Json | None = None
        self._failure: ChatFailure | None = None

    @property
    def over(self) -> bool:
        """Whether the response has ended."""
        return self.status not in ("queued", "in_progress")

    @property
    def number(self) -> int:
        """The number of the next event."""
        return self._number

    @property
    def failure(self) -> ChatFailure | None:
        """Why there is no (whole) answer, once that is known."""
        return self._failure

    def begin(self) -> list[Json]:
        """The events with which every response begins."""
        self._add("response.created", response=self.response())
        if self._request.background:
            self._add("response.queued", response=self.response())
        else:
            self._start()
        return self._take()

    def feed(self, frame: Frame) -> list[Json]:
        """Take a frame of the chat. An attempt that starts over needs another :class:`ResponseEvents`."""
        if self.over:
            return []
        if frame.flags & HEAD and self.status == "queued":
            self._start()
        for chunk in self._reader.feed(frame):
            self._on_chunk(chunk)
        if self._reader.failure is not None:
            self._end_with(self._reader.failure)
        elif self._reader.over:
            self._end()
        return self._take()

    def fail(self, failure: ChatFailure) -> list[Json]:
        """The job ended without an answer."""
        if not self.over:
            self._end_with(failure)
        return self._take()

    def cancel(self, message: str) -> list[Json]:
        """The job was cancelled. The API has no event of its own for it: the response in it says so."""
        if not self.over:
            self._end_with(ChatFailure(message, 499, "cancelled"), "cancelled")
        return self._take()

    def response(self) -> Json:
        """The response as it is now; with its output once it is over."""
        status, reason = self.status, None
        if status == "incomplete":
            reason = status_of_finish(self._finish)[1]
        return response_object(
            self._request,
            status,
            [item.as_json() for item in self._items] if self.over else (),
            usage=self._usage if self.over else None,
            incomplete=reason,
            error=response_error(self._failure) if self._failure is not None else None,
        )

    def _start(self) -> None:
        self.status = "in_progress"
        self._add("response.in_progress", response=self.response())

    def _on_chunk(self, chunk: Json) -> None:
        if type(chunk.get("usage")) is dict:
            self._usage = response_usage(chunk["usage"])
        for choice in chunk["choices"]:
            delta = choice.get("delta")
            if choice.get("index", 0) == 0 and type(delta) is dict:
                self._on_delta(delta, choice.get("logprobs"))
        finish = finish_of(chunk)
        if finish and self._finish is None:
            self._finish = finish
            self._close_all("incomplete" if status_of_finish(finish)[0] == "incomplete" else "completed")

    def _on_delta(self, delta: Json, logprobs: Any) -> None:
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        if reasoning and type(reasoning) is str:
            self._add_text("reasoning", "reasoning_text", reasoning)
        text = delta.get("content")
        if text and type(text) is str:
            self._add_text("message", "output_text", text, response_logprobs(logprobs))
        refusal = delta.get("refusal")
        if refusal and type(refusal) is str:
            self._add_text("message", "refusal", refusal)
        calls = delta.get("tool_calls")
        for place, call in enumerate(calls if type(calls) is list else ()):
            if type(call) is dict and type(call.get("function")) is dict:
                index = call.get("index", place)
                self._on_call(index if type(index) is int else place, call, call["function"])

    def _add_text(self, kind: str, name: str, text: str, logprobs: list[Json] | None = None) -> None:
        item = self._open
        if item is None or item.kind != kind:
            self._close_all()
            item = self._open = self._new_item(kind)
        if not item.parts or item.parts[-1].name != name:
            self._close_part(item)
            part = _Part(name, _PARTS[name])
            item.parts.append(part)
            self._add("response.content_part.added", **self._where(item), part=part.as_json())
        part = item.parts[-1]
        part.pieces.append(text)
        part.logprobs += logprobs or ()
        more: Json = {"logprobs": logprobs or []} if name == "output_text" else {}
        self._add(f"response.{name}.delta", **self._where(item), delta=text, **more)

    def _on_call(self, index: int, call: Json, function: Json) -> None:
        item = self._calls.get(index)
        if item is None:
            self._close_open()
            item = self._calls[index] = self._new_item(
                "function_call", str(call.get("id") or ""), str(function.get("name") or "")
            )
        item.function = item.function or str(function.get("name") or "")
        arguments = function.get("arguments")
        if arguments and type(arguments) is str:
            item.arguments.append(arguments)
            self._add(
                "response.function_call_arguments.delta", item_id=item.name, output_index=item.place, delta=arguments
            )

    def _new_item(self, kind: str, call_id: str = "", function: str = "") -> _Item:
        place = len(self._items)
        name = item_id(kind, self._request.job_id, place)
        item = _Item(kind, place, name, call_id=call_id or f"call_{self._request.job_id}_{place}", function=function)
        self._items.append(item)
        self._add("response.output_item.added", output_index=place, item=item.as_json())
        return item

    def _close_all(self, last: str = "completed") -> None:
        """Whatever is open is closed; ``last`` is the status of what the answer ends with."""
        for item in self._calls.values():
            self._add(
                "response.function_call_arguments.done",
                item_id=item.name,
                output_index=item.place,
                arguments="".join(item.arguments),
            )
            self._close(item, last if item.place == len(self._items) - 1 else "completed")
        self._calls.clear()
        self._close_open(last)

    def _close_open(self, status: str = "completed") -> None:
        if self._open is not None:
            self._close_part(self._open)
            self._close(self._open, status)
            self._open = None

    def _close(self, item: _Item, status: str) -> None:
        item.status = status
        self._add("response.output_item.done", output_index=item.place, item=item.as_json())

    def _close_part(self, item: _Item) -> None:
        if not item.parts:
            return
        part, where = item.parts[-1], self._where(item)
        text = {"refusal": part.text} if part.name == "refusal" else {"text": part.text}
        more: Json = {"logprobs": part.logprobs} if part.name == "output_text" else {}
        self._add(f"response.{part.name}.done", **where, **text, **more)
        self._add("response.content_part.done", **where, part=part.as_json())

    def _end(self) -> None:
        status, _ = status_of_finish(self._finish)
        if status == "failed":
            self._end_with(ChatFailure(_BROKEN_OFF))
            return
        self.status = status
        self._add(f"response.{status}", response=self.response())

    def _end_with(self, failure: ChatFailure, status: ResponseStatus = "failed") -> None:
        for item in self._items:
            if item.status == "in_progress":
                item.status = "incomplete"
        self.status, self._failure = status, failure
        self._add("response.failed", response=self.response())

    def _where(self, item: _Item) -> Json:
        return {"item_id": item.name, "output_index": item.place, "content_index": max(len(item.parts) - 1, 0)}

    def _add(self, kind: str, **fields: Any) -> None:
        self._events.append({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1

    def _take(self) -> list[Json]:
        events, self._events = self._events, []
        return events
