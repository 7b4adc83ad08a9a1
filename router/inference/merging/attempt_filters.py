"""Filter a later attempt of a stream down to what the client still lacks of it, for :class:`AttemptMerger`.

:class:`ReplayFilter` is for an attempt that started over: it drops text that the client has, passes roles and finish
reasons once, and raises :class:`~queue_schemas.StreamBroken` when the new attempt says something else.
:class:`ContinuationFilter` is for one that continues behind what was delivered
(:mod:`openai_api.completions.continuable`): it drops only what every attempt says at its beginning. Either way ``id``
and ``created`` stay the first attempt's, and two different answers are never spliced.
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


class AttemptFilter(Protocol):
    """Turns the events of a later attempt into what the client still lacks."""

    def feed(self, event: bytes) -> bytes:
        """What the client still lacks of ``event`` (one whole event of the new attempt); may be empty."""
        ...

    def finish(self) -> None:
        """The new attempt is over. May raise ``StreamBroken``."""
        ...


@dataclass(slots=True)
class _Choice:
    """What the client has of one choice, and how much of it the new attempt has repeated."""

    texts: dict[str, str] = field(default_factory=dict)
    role: str | None = None
    finish: Any = None
    repeated: dict[str, int] = field(default_factory=dict)

    @property
    def caught_up(self) -> bool:
        return all(self.repeated.get(channel, 0) == len(text) for channel, text in self.texts.items())


class ReplayFilter:
    """Compares an attempt that started over with what was ``delivered``. Raises ``StreamBroken`` where they differ or
    cannot be compared."""

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
        """Raise ``StreamBroken`` unless it has said all that the client has."""
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
            raise differs("its end differs")
        new_role = role if role and not known.role else None
        new_finish = finish if not known.finish else None
        if not (has_text or new_role or new_finish):
            return None
        known.role = known.role or role
        return with_parts(choice, new_role, rests)

    def _rest(self, known: _Choice, channel: str, text: str) -> str:
        delivered = known.texts.get(channel, "")
        at = known.repeated.get(channel, 0)
        repeated = delivered[at : at + len(text)]
        if repeated != text[: len(repeated)]:
            raise differs("its text differs")
        known.repeated[channel] = at + len(repeated)
        return text[len(repeated) :]

    def _is_new_usage(self, chunk: Chunk) -> bool:
        if chunk["choices"] or not chunk.get("usage"):
            return False
        self.finish()
        return not self._usage_sent


class ContinuationFilter:
    """Passes on an attempt that began where the ``delivered`` text ends."""

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
        """Accept whatever it has said as the rest."""

    def _without_beginning(self, chunk: Chunk) -> bytes:
        with_text = [
            with_parts(choice, None, parts_of(choice)[1]) for choice in chunk["choices"] if _has_content(choice)
        ]
        if chunk["choices"] and not with_text:
            return b""
        chunk["choices"] = with_text
        return encode_json(chunk | self._identity)


def _has_content(choice: Chunk) -> bool:
    return any(parts_of(choice)[1].values()) or bool(choice.get("finish_reason"))
