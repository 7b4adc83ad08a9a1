"""Server-sent events, as tests read them."""

from __future__ import annotations

import re

_COMMENT = re.compile(rb"^:.*\n", re.MULTILINE)


def without_comments(events: bytes) -> bytes:
    """``events`` without their comments, which are single lines before an event's own."""
    return _COMMENT.sub(b"", events)
