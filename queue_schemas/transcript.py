"""What a client has of a stream of completion chunks: enough to check another attempt against it, or to go on from it.

Events are kept as they were delivered and read only when there is need to, or when so many have gathered that their
text alone takes much less room: a stream that meets no loss costs no parsing to speak of.

Only plain text can be followed so: chat and text completion chunks without tool calls, log probabilities or token ids.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import orjson

from .errors import StreamBroken

DONE = b"[DONE]"
FOLD_BYTES = 64 * 1024
"""So much of a stream is kept unread. An event of one token is some 250 bytes for some 4 of text."""
IDENTITY = ("id", "created", "model", "system_fingerprint")
_OBJECTS = ("chat.completion.chunk", "text_completion")
"""A tuple: engines may send anything there, also what has no hash."""
_TEXT_CHANNELS = ("content", "reasoning_content", "reasoning")
_HARMLESS_CHOICE_KEYS = frozenset({"index", "delta", "text", "finish_reason", "stop_reason"})

Chunk = dict[str, Any]


@dataclass(slots=True)
class Said:
    """What the client has of one choice. ``texts`` are pieces by channel; a text completion has only ``content``."""

    texts: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    role: str | None = None
    finish: Any = None

    def text(self, channel: str) -> str:
        """All of a channel's text."""
        pieces = self.texts[channel]
        if len(pieces) > 1:
            pieces[:] = ["".join(pieces)]
        return pieces[0] if pieces else ""


class Transcript:
    """Add what is delivered. All else is about what was added so far, and but for ``too_long`` and ``identity`` raises
    ``StreamBroken`` if that was more than ``limit_bytes`` or cannot be read."""

    __slots__ = (
        "_broken",
        "_choices",
        "_complete",
        "_identity",
        "_limit",
        "_raw",
        "_raw_size",
        "_text_size",
        "_too_long",
        "_usage",
    )

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._raw: list[bytes] = []
        self._raw_size = 0
        self._text_size = 0
        self._choices: dict[int, Said] = {}
        self._identity: Chunk = {}
        self._complete = False
        self._usage = False
        self._too_long = False
        self._broken: StreamBroken | None = None

    def add(self, events: bytes) -> None:
        """Whole events were delivered."""
        if self._broken is not None:
            return
        self._raw.append(events)
        self._raw_size += len(events)
        if self._raw_size > FOLD_BYTES or self._raw_size + self._text_size > self._limit:
            self._fold()

    def lose(self, why: StreamBroken) -> None:
        """Something was delivered that cannot be followed."""
        self._broken = self._broken or why
        self._raw.clear()
        self._choices.clear()

    @property
    def complete(self) -> bool:
        """Whether the client has the end, ``[DONE]``."""
        return self._read()._complete

    @property
    def usage(self) -> bool:
        """Whether the client has the usage of the whole answer."""
        return self._read()._usage

    @property
    def identity(self) -> Chunk:
        """What the first attempt called the answer: ``id``, ``created`` and the like; empty if it was never read."""
        self._catch_up()
        return self._identity

    @property
    def too_long(self) -> bool:
        """Whether all was read, but is more than is kept."""
        self._catch_up()
        return self._too_long

    @property
    def choices(self) -> dict[int, Said]:
        """What was said, by choice."""
        return self._read()._choices

    @property
    def finished(self) -> bool:
        """Whether each choice that began has ended."""
        choices = self.choices
        return bool(choices) and all(said.finish for said in choices.values())

    @property
    def text(self) -> str | None:
        """The text behind which another attempt may go on; None if there was more than one plain text."""
        choices = self.choices
        if choices.keys() - {0}:
            return None
        said = choices.get(0, Said())
        if said.finish or any(said.text(channel) for channel in said.texts if channel != "content"):
            return None
        return said.text("content")

    def _catch_up(self) -> None:
        if self._broken is None and self._raw:
            self._fold()

    def _read(self) -> Transcript:
        self._catch_up()
        if self._broken is not None:
            raise self._broken
        return self

    def _fold(self) -> None:
        events = split_events(b"".join(self._raw))
        self._raw.clear()
        self._raw_size = 0
        try:
            for event in events:
                data = event_data(event)
                if data == DONE:
                    self._complete = True
                elif data:
                    self._remember(read_chunk(data))
        except StreamBroken as error:
            self.lose(error)
        if self._broken is None and self._text_size > self._limit:
            self._too_long = True
            self.lose(
                StreamBroken(
                    "the stream cannot go on: its worker was lost after more was delivered than is kept of a stream; "
                    "send the request again"
                )
            )

    def _remember(self, chunk: Chunk) -> None:
        if not self._identity:
            self._identity = {key: chunk[key] for key in IDENTITY if key in chunk}
        for choice in chunk["choices"]:
            said = self._choices.setdefault(choice["index"], Said())
            role, texts = parts_of(choice)
            said.role = said.role or role
            for channel, text in texts.items():
                said.texts[channel].append(text)
                self._text_size += len(text)
            said.finish = said.finish or choice.get("finish_reason")
        if not chunk["choices"] and chunk.get("usage"):
            self._usage = True


def split_events(stream: bytes) -> list[bytes]:
    """The events of an SSE stream, each with the blank line that ends it."""
    return [event + b"\n\n" for event in stream.replace(b"\r\n", b"\n").split(b"\n\n") if event.strip()]


def end_of_events(data: bytes) -> int:
    """Where the last whole event of ``data`` ends; 0 if there is none."""
    bare, with_returns = data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n")
    return max(bare + 2 if bare >= 0 else 0, with_returns + 4 if with_returns >= 0 else 0)


def event_data(event: bytes) -> bytes:
    """The data of an event; empty for a comment."""
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines).strip()


def as_event(chunk: Chunk) -> bytes:
    """A chunk as an event."""
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def read_chunk(data: bytes) -> Chunk:
    """The completion chunk in an event's data. Raises ``StreamBroken`` for anything else, an error included."""
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise incomparable("it has events that are not JSON") from None
    if type(chunk) is dict and "error" in chunk:
        raise differs("it failed")
    if type(chunk) is not dict or chunk.get("object") not in _OBJECTS or type(chunk.get("choices")) is not list:
        raise incomparable("its events are not chat or text completion chunks")
    for choice in chunk["choices"]:
        if type(choice) is not dict or type(choice.get("index")) is not int:
            raise incomparable("it has choices without an index")
        strange = [key for key, value in choice.items() if value is not None and key not in _HARMLESS_CHOICE_KEYS]
        if strange:
            raise incomparable(f"its choices carry {strange[0]}")
    return chunk


def parts_of(choice: Chunk) -> tuple[str | None, dict[str, str]]:
    """The role and the text, by channel, of a choice. A text completion has one channel."""
    role: str | None = None
    texts: dict[str, str] = {}
    delta = choice.get("delta")
    fields = {"content": choice.get("text")} if delta is None else delta
    if type(fields) is not dict:
        raise incomparable("its deltas are not objects")
    for key, value in fields.items():
        if key == "role":
            role = value
        elif key in _TEXT_CHANNELS and type(value) is str:
            texts[key] = value
        elif value:
            raise incomparable(f"its deltas carry {key}")
    return role, texts


def with_parts(choice: Chunk, role: str | None, texts: dict[str, str]) -> Chunk:
    """``choice`` with another role and other texts."""
    delta = choice.get("delta")
    if delta is None:
        return {**choice, "text": texts.get("content", "")}
    rest = {key: value for key, value in delta.items() if key != "role"} | texts
    return {**choice, "delta": {"role": role, **rest} if role else rest}


def differs(how: str) -> StreamBroken:
    """The error for a new attempt that does not agree with what was delivered."""
    return StreamBroken(
        f"the stream cannot go on: its worker was lost, and the answer made again differs: {how}; "
        "send the request again"
    )


def incomparable(why: str) -> StreamBroken:
    """The error for a stream that cannot be followed."""
    return StreamBroken(
        "the stream cannot go on: its worker was lost, and a new attempt cannot be checked against what was delivered, "
        f"because {why}; send the request again"
    )
