"""Decide which streams an engine has forgotten while it serves others: each of those is stopped alone.

Rules:

* A stream that has begun is stalled when nothing came of it for the whole timeout, and something came of others at the
  end of that. That its engine's counters move proves nothing: they may count this very stream, whose output a parser
  buffers.
* Engines buffer output for long while they call tools, keep to a format, reason, or read a long prompt. Such requests,
  and streams of which no more than their beginning came, have a timeout of their own, far longer.
* Time in which this worker did not read (its Router is slow), or did not check (its process, perhaps with the engine,
  was suspended), does not count.
* An answer that has not begun, above all a plain one, shows nothing until its end: only its deadline ends it, or the
  stall of the whole engine (:mod:`worker.core.engine_progress`).
"""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from openai_api.paths import CHAT_PATH, COMPLETIONS_PATH
from queue_schemas import Job

_MAX_GAP, _MIN_GAP_S = 1 / 3, 1.0
"""Part of the timeout that may pass between two checks (always a second: a busy loop is late); after a longer gap
nothing is known of the time between."""

_BUFFERING = (
    "tools", "tool_choice", "functions", "function_call", "response_format", "structured_outputs", "guided_json",
    "guided_regex", "guided_choice", "guided_grammar", "json_schema", "grammar", "reasoning", "reasoning_effort",
    "include_reasoning", "thinking", "chat_template_kwargs", "use_beam_search",
)  # fmt: skip
"""Fields of a request that may make an engine buffer its answer."""


def may_buffer(job: Job) -> bool:
    """Whether an engine may be silent for long though it works on ``job``: on all but plain text."""
    if job.path not in (CHAT_PATH, COMPLETIONS_PATH):
        return True
    try:
        request = orjson.loads(job.body)
    except orjson.JSONDecodeError:
        return True
    return type(request) is not dict or any(request.get(field) is not None for field in _BUFFERING)


@dataclass(slots=True)
class StreamStall:
    """One stream. ``pieces`` counts what came of it and ``reading`` says whether its reader waits for more: both are
    written where the stream is read, and checked from time to time."""

    pieces: int = 0
    reading: bool = False
    _counted: int = -1
    _since: float = 0.0
    _checked_at: float = 0.0

    @property
    def has_only_begun(self) -> bool:
        """Whether what came may be the beginning alone, which some engines send before they read the prompt."""
        return self.pieces < 2

    def is_stalled(self, now: float, others_at: float, timeout_s: float) -> bool:
        """Whether it is stalled at ``now`` (s). ``others_at``: when anything last came of any answer of this worker."""
        unseen = now - self._checked_at > max(timeout_s * _MAX_GAP, _MIN_GAP_S)
        self._checked_at = now
        if self.pieces != self._counted or not self.reading or unseen:
            self._counted = self.pieces
            self._since = now
        return self.pieces > 0 and others_at - self._since >= timeout_s
