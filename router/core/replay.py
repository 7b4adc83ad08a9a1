"""Checking a second attempt of a stream against what the client already has.

An attempt that was lost after part of its stream was delivered runs again from the start. :class:`Replay` is given
what was delivered, and turns each event of the new attempt into what is still missing: text that the client has is
suppressed, ``id`` and ``created`` become the first attempt's, roles and finish reasons appear once. The moment the new
attempt says something else, :class:`~queue_schemas.StreamBroken` is raised: nothing is ever spliced.

Only plain text can be compared so: chat and text completion chunks without tool calls, log probabilities or token ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson

from queue_schemas import StreamBroken

DONE = b"[DONE]"
_OBJECTS = frozenset({"chat.completion.chunk", "text_completion"})
_TEXT_CHANNELS = ("content", "reasoning_content", "reasoning")
_HARMLESS_CHOICE_KEYS = frozenset({"index", "delta", "text", "finish_reason", "stop_reason"})


@dataclass(slots=True)
class _Choice:
    """What the client has of one choice, and how much of it the new attempt has said again."""

    texts: dict[str, str] = field(default_factory=dict)
    said: dict[str, int] = field(default_factory=dict)
    role: str | None = None
    finish: Any = None

    @property
    def caught_up(self) -> bool:
        return all(self.said.get(channel, 0) == len(text) for channel, text in self.texts.items())


class Replay:
    """Made from the events that were ``delivered``; raises ``StreamBroken`` if they cannot be compared."""

    def __init__(self, delivered: bytes) -> None:
        self.complete = False
        """Whether the client has everything already, ``[DONE]`` included."""
        self._choices: dict[int, _Choice] = {}
        self._identity: dict[str, Any] = {}
        self._usage_sent = False
        for event in split_events(delivered):
            data = event_data(event)
            if data == DONE:
                self.complete = True
            elif data:
                self._remember(_chunk(data))

    def feed(self, event: bytes) -> bytes:
        """What the client still lacks of ``event`` (one whole event of the new attempt); may be empty."""
        data = event_data(event)
        if not data:
            return b""
        if data == DONE:
            self.finish()
            return b"" if self.complete else event
        chunk = _chunk(data)
        missing = [rest for choice in chunk["choices"] if (rest := self._missing(choice))]
        if not missing and not self._is_new_usage(chunk):
            return b""
        chunk["choices"] = missing
        return b"data: " + orjson.dumps(chunk | self._identity) + b"\n\n"

    def finish(self) -> None:
        """The new attempt is over: it must have said all that the client has."""
        if not all(choice.caught_up for choice in self._choices.values()):
            raise _differs("it ended earlier")

    def _remember(self, chunk: dict[str, Any]) -> None:
        if not self._identity:
            self._identity = {key: chunk[key] for key in ("id", "created") if key in chunk}
        for choice in chunk["choices"]:
            known = self._choice(choice)
            role, texts = _parts(choice)
            known.role = known.role or role
            for channel, text in texts.items():
                known.texts[channel] = known.texts.get(channel, "") + text
            known.finish = known.finish or choice.get("finish_reason")
        if not chunk["choices"] and chunk.get("usage"):
            self._usage_sent = True

    def _choice(self, choice: dict[str, Any]) -> _Choice:
        return self._choices.setdefault(choice["index"], _Choice())

    def _missing(self, choice: dict[str, Any]) -> dict[str, Any] | None:
        """The part of a choice that the client lacks, or None."""
        known = self._choice(choice)
        role, texts = _parts(choice)
        rests = {channel: self._rest(known, channel, text) for channel, text in texts.items()}
        finish = choice.get("finish_reason")
        has_text = any(rests.values())
        if (has_text or finish) and not known.caught_up:
            raise _differs("it went on, or ended, before it had said all that was delivered")
        if known.finish and (has_text or (finish and finish != known.finish)):
            raise _differs("its end is another one")
        new_role = role if role and not known.role else None
        new_finish = finish if not known.finish else None
        if not (has_text or new_role or new_finish):
            return None
        known.role = known.role or role
        return _with_parts(choice, new_role, rests)

    def _rest(self, known: _Choice, channel: str, text: str) -> str:
        delivered = known.texts.get(channel, "")
        at = known.said.get(channel, 0)
        again = delivered[at : at + len(text)]
        if again != text[: len(again)]:
            raise _differs("its text is another one")
        known.said[channel] = at + len(again)
        return text[len(again) :]

    def _is_new_usage(self, chunk: dict[str, Any]) -> bool:
        if chunk["choices"] or not chunk.get("usage"):
            return False
        self.finish()
        return not self._usage_sent


def split_events(stream: bytes) -> list[bytes]:
    """The events of an SSE stream, each with the blank line that ends it."""
    return [event + b"\n\n" for event in stream.replace(b"\r\n", b"\n").split(b"\n\n") if event.strip()]


def event_data(event: bytes) -> bytes:
    """The data of an event; empty for a comment."""
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines).strip()


def _chunk(data: bytes) -> dict[str, Any]:
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise _incomparable("it has events that are not JSON") from None
    if type(chunk) is dict and "error" in chunk:
        raise _differs("it failed")
    if type(chunk) is not dict or chunk.get("object") not in _OBJECTS or type(chunk.get("choices")) is not list:
        raise _incomparable("its events are not chat or text completion chunks")
    for choice in chunk["choices"]:
        if type(choice) is not dict or type(choice.get("index")) is not int:
            raise _incomparable("it has choices without an index")
        strange = [key for key, value in choice.items() if value is not None and key not in _HARMLESS_CHOICE_KEYS]
        if strange:
            raise _incomparable(f"its choices carry {strange[0]}")
    return chunk


def _parts(choice: dict[str, Any]) -> tuple[str | None, dict[str, str]]:
    """The role and the text, by channel, of a choice. A text completion has one channel."""
    role: str | None = None
    texts: dict[str, str] = {}
    delta = choice.get("delta")
    fields = {"content": choice.get("text")} if delta is None else delta
    if type(fields) is not dict:
        raise _incomparable("its deltas are not objects")
    for key, value in fields.items():
        if key == "role":
            role = value
        elif key in _TEXT_CHANNELS and type(value) is str:
            texts[key] = value
        elif value:
            raise _incomparable(f"its deltas carry {key}")
    return role, texts


def _with_parts(choice: dict[str, Any], role: str | None, rests: dict[str, str]) -> dict[str, Any]:
    delta = choice.get("delta")
    if delta is None:
        return {**choice, "text": rests.get("content", "")}
    rest = {key: value for key, value in delta.items() if key != "role"} | rests
    return {**choice, "delta": {"role": role, **rest} if role else rest}


def _differs(how: str) -> StreamBroken:
    return StreamBroken(
        f"the stream cannot go on: its worker was lost, and the answer made again differs: {how}; "
        "send the request again"
    )


def _incomparable(why: str) -> StreamBroken:
    return StreamBroken(
        "the stream cannot go on: its worker was lost, and a new attempt cannot be checked against what was delivered, "
        f"because {why}; send the request again"
    )
