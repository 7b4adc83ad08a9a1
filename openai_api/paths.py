"""The inference paths that engines serve, and whether a completion request asks for usage."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH = "/v1/completions"
RESPONSES_PATH = "/v1/responses"
INFERENCE_PATHS: tuple[str, ...] = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/rerank",
    "/v2/rerank",
    "/rerank",
    "/v1/score",
    "/score",
    "/v2/embed",
    "/pooling",
    "/classify",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/tokenize",
    "/detokenize",
)
"""Paths that engines serve for inference, vLLM's among them; settings may add to them.

A request's path passes only if it is exactly one of them: encoded, doubled or dotted spellings are other paths, so no
spelling leads to an engine's control paths.
"""

MULTIPART_PATHS = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})
"""Those that take a form with a file, not JSON."""

_PLAIN_PATH = re.compile(r"(/[A-Za-z0-9_.-]*[A-Za-z0-9_-])+")


def known_paths(extra: Iterable[str]) -> frozenset[str]:
    """The allowlist with the settings' ``extra`` paths. Raises ``ValueError`` for one that cannot be an engine's."""
    for path in extra:
        if not _PLAIN_PATH.fullmatch(path):
            raise ValueError(f"{path!r} is not a plain path: write it like /v1/classify")
    return frozenset(INFERENCE_PATHS) | frozenset(extra)


def wants_usage(request: Mapping[str, Any]) -> bool:
    """Whether a stream for ``request``, a parsed body, ends with a chunk that tells the usage."""
    options = request.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))
