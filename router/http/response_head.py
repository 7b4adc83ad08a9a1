"""The head of an answer: status, content type and headers, as the engine sent them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from openai_api.sse import EVENT_STREAM
from queue_schemas.records import record


@record
class ResponseHead:
    """Sent before the first byte of the body."""

    status: int
    content_type: str
    headers: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Of the engine's, those that the client is to see."""

    is_event_stream: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if self.content_type.startswith(EVENT_STREAM):
            object.__setattr__(self, "is_event_stream", True)

    @property
    def is_json(self) -> bool:
        return self.content_type.partition(";")[0].strip().endswith(("/json", "+json"))

    @property
    def is_text(self) -> bool:
        """Whether it can be shown as text."""
        return self.is_json or self.content_type.startswith("text/")
