"""Following another attempt of a stream, after one that was lost when part of it was delivered.

:class:`ReplayVerifier` is for an attempt that began anew: text that the client has is suppressed, roles and finish
reasons appear once, and the moment the new attempt says something else, :class:`~queue_schemas.StreamBroken` is raised.
:class:`ContinuationVerifier` is for one that goes on behind what was delivered (:mod:`router.inference.continuation`):
only what every attempt says at its beginning is left out. Either way ``id`` and ``created`` stay the first attempt's,
and nothing is ever spliced unseen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from openai_api.sse import DONE, encode_json, event_data
from openai_api.transcript import (
    Chunk,
    Transcript,
    differs,
    incomparable,
    parts_of,
    read_chunk,
    with_parts,
)


class Following(Protocol):
    """How the events of a later attempt become what the client still lacks."""

    def feed(self, event: bytes) -> bytes:
        """What the client still lacks of ``event`` (one whole event of the new attempt); may be empty."""
        ...

    def finish(self) -> None:
        """The new attempt is over."""
        ...


@dataclass(slots=True)
class _Choice:
    """What the client had of one choice, and how much of it the new attempt has said again."""

    texts: dict[str, str] = field(default_factory=dict)
    role: str | None = None
    finish: Any = None
    said: dict[str, int] = field(default_factory=dict)

    @property
    def caught_up(self) -> bool:
        return all(self.said.get(channel, 0) == len(text) for channel, text in self.texts.items())


class ReplayVerifier:
    """Compares with what was ``delivered``; raises ``StreamBroken`` if that cannot be done."""

    def __init__(self, delivered: Transcript) -> None:
        self._complete = delivered.complete
        self._usage_sent = delivered.usage
        self._identity = delivered.identity
        self._choices = {
            index: _Choice({channel: said.text(channel) for channel in said.texts}, said.role, said.finish)
            for index, said in delivered.choices.items()
        }

    def feed(self, event: bytes) -> bytes:
        data = event_data(event)
        if not data:
            return b""
        if data == DONE:
            self.finish()
            return b"" if self._complete else event
        chunk = read_chunk(data)
        missing = [rest for choice in chunk["choices"] if (rest := self._missing(choice))]
        if not missing and not self._is_new_usage(chunk):
            return b""
        chunk["choices"] = missing
        return encode_json(chunk | self._identity)

    def finish(self) -> None:
        """It must have said all that the client has."""
        if not all(choice.caught_up for choice in self._choices.values()):
            raise differs("it ended earlier")

    def _missing(self, choice: Chunk) -> Chunk | None:
        """The part of a choice that the client lacks, or None."""
        known = self._choices.setdefault(choice["index"], _Choice())
        role, texts = parts_of(choice)
        rests = {channel: self._rest(known, channel, text) for channel, text in texts.items()}
        finish = choice.get("finish_reason")
        has_text = any(rests.values())
        if (has_text or finish) and not known.caught_up:
            raise differs("it went on, or ended, before it had said all that was delivered")
        if known.finish and (has_text or (finish and finish != known.finish)):
            raise differs("its end is another one")
        new_role = role if role and not known.role else None
        new_finish = finish if not known.finish else None
        if not (has_text or new_role or new_finish):
            return None
        known.role = known.role or role
        return with_parts(choice, new_role, rests)

    def _rest(self, known: _Choice, channel: str, text: str) -> str:
        delivered = known.texts.get(channel, "")
        at = known.said.get(channel, 0)
        again = delivered[at : at + len(text)]
        if again != text[: len(again)]:
            raise differs("its text is another one")
        known.said[channel] = at + len(again)
        return text[len(again) :]

    def _is_new_usage(self, chunk: Chunk) -> bool:
        if chunk["choices"] or not chunk.get("usage"):
            return False
        self.finish()
        return not self._usage_sent


class ContinuationVerifier:
    """Passes on what an attempt says that began where the ``delivered`` text ends."""

    def __init__(self, delivered: Transcript) -> None:
        self._identity = delivered.identity

    def feed(self, event: bytes) -> bytes:
        data = event_data(event)
        if not data:
            return b""
        if data == DONE:
            return event
        try:
            chunk: Any = orjson.loads(data)
        except orjson.JSONDecodeError:
            raise incomparable("it has events that are not JSON") from None
        if type(chunk) is dict and "error" in chunk:
            return event
        return self._without_beginning(read_chunk(data))

    def finish(self) -> None:
        """Whatever it has said is the rest."""

    def _without_beginning(self, chunk: Chunk) -> bytes:
        spoken = [with_parts(choice, None, parts_of(choice)[1]) for choice in chunk["choices"] if _speaks(choice)]
        if chunk["choices"] and not spoken:
            return b""
        chunk["choices"] = spoken
        return encode_json(chunk | self._identity)


def _speaks(choice: Chunk) -> bool:
    return any(parts_of(choice)[1].values()) or bool(choice.get("finish_reason"))
