"""Refuse a request in vLLM's words, also one with options that the simulated engine would otherwise ignore silently."""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]

_CHANGES_THE_ANSWER = {
    "chat": ("functions", "function_call", "audio", "web_search_options", "prompt_logprobs", "echo"),
    "text": ("suffix", "prompt_logprobs", "prompt_embeds"),
    "responses": ("top_logprobs",),
    "messages": ("mcp_servers", "container"),
}
_EVERYWHERE = ("return_token_ids", "return_tokens_as_token_ids", "use_beam_search")
"""Options that change the shape of an answer, and that a simulated engine does not simulate."""


class RefusedRequest(Exception):
    """The request is answered with an error object. ``kind`` is vLLM's name for it."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, kind: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.kind = kind or ("NotFoundError" if status == 404 else "BadRequestError")


def refuse_unsimulated(fields: Fields, api: str) -> None:
    """Refuse, by name, what would make another answer than the one that is simulated. Sampling options are harmless."""
    for name in (*_CHANGES_THE_ANSWER[api], *_EVERYWHERE):
        if fields.get(name) not in (None, False, 0, "", [], {}, "none"):
            raise RefusedRequest(f"{name} is not supported by a simulated engine", param=name)
    modalities = fields.get("modalities")
    if modalities not in (None, [], ["text"]):
        raise RefusedRequest("modalities: a simulated engine answers with text only", param="modalities")
