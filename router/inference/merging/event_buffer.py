"""Cuts the bytes of a streamed answer into whole events, so that half an event of a lost attempt is never delivered."""

from __future__ import annotations

from openai_api.sse import MAX_EVENT_BYTES, end_of_events


class EventBuffer:
    """Holds back the event that is not whole yet. ``mid_event``: a piece of a long event was released, and only its
    rest may follow."""

    __slots__ = ("held", "mid_event")

    def __init__(self) -> None:
        self.held = b""
        self.mid_event = False

    @property
    def overfull(self) -> bool:
        """Whether the held event is too long to wait for: :meth:`release` it."""
        return len(self.held) > MAX_EVENT_BYTES

    def feed(self, data: bytes) -> bytes:
        """The whole events up to the end of ``data``."""
        data = self.held + data
        end = end_of_events(data)
        self.mid_event = self.mid_event and not end
        self.held = data[end:]
        return data[:end]

    def release(self) -> bytes:
        """The piece of the event that is not whole yet."""
        held, self.held, self.mid_event = self.held, b"", True
        return held

    def discard(self) -> None:
        """Drop what is held: its attempt was lost."""
        self.held = b""
