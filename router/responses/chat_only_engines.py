"""Remembers which models' engines serve no Responses API, so that their responses are built from chats at once.

Nothing says so beforehand, and the engines of one model may differ. So a response is asked of an engine first; one that
lacks the path refuses it, and the request is sent again as a chat. For a while the next requests for that model begin
there: every engine serves chats, even once one of them serves responses.
"""

from __future__ import annotations

from collections.abc import Callable

from queue_schemas import Pool

REMEMBERED_S = 300.0
_MAX_MODELS = 10_000


class ChatOnlyEngines:
    """The models whose engines lacked the Responses API within the last ``REMEMBERED_S``."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        """``now_s`` is a monotonic clock."""
        self._now_s = now_s
        self._until_s: dict[Pool, float] = {}

    def add(self, model: Pool) -> None:
        """An engine of ``model`` lacks the path."""
        if len(self._until_s) >= _MAX_MODELS:
            self._until_s.clear()
        self._until_s[model] = self._now_s() + REMEMBERED_S

    def __contains__(self, model: Pool) -> bool:
        until_s = self._until_s.get(model)
        if until_s is None:
            return False
        if self._now_s() < until_s:
            return True
        del self._until_s[model]
        return False
