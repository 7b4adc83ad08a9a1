"""Chat and text completions, and responses: where an engine serves them, and what a request for one asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
RESPONSES_PATH = "/v1/responses"


def wants_usage(request: Mapping[str, Any]) -> bool:
    """Whether a stream for ``request``, a parsed body, ends with a chunk that tells the usage."""
    options = request.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))
