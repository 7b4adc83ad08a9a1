"""Which streams an engine has forgotten while it serves others: each of those is given up alone.

Rules:

* A stream that has begun is stuck when nothing came of it for the whole limit, and something came of others at the end
  of it. That its engine's counters move proves nothing: they may count this very stream, whose words a parser holds
  back.
* Engines hold back what they say for long while they call tools, keep to a format, think, or read a long prompt. Such
  requests, and streams of which no more than their beginning came, have a limit of their own, far longer.
* Time in which this worker did not read (its Router is slow), or nobody looked (its process, perhaps with the engine,
  was stopped), is not the engine's silence.
* What has not begun, plain answers above all, says nothing until its end: only its deadline ends it, or the stall of
  the whole engine (:mod:`worker.core.engine_progress`).
"""

from __future__ import annotations

from dataclasses import dataclass

import orjson

from openai_api.paths import CHAT_PATH, COMPLETIONS_PATH
from queue_schemas import Job

_MAX_GAP, _MIN_GAP_S = 1 / 3, 1.0
"""Part of the limit that may pass between two looks (always a second: a busy loop is late); after a longer one nothing
is known of the time between."""

_HOLDING_BACK = (
    "tools", "tool_choice", "functions", "function_call", "response_format", "structured_outputs", "guided_json",
    "guided_regex", "guided_choice", "guided_grammar", "json_schema", "grammar", "reasoning", "reasoning_effort",
    "include_reasoning", "thinking", "chat_template_kwargs", "use_beam_search",
)  # fmt: skip
"""Fields of a request whose presence may make an engine hold back its answer."""


def may_hold_back(job: Job) -> bool:
    """Whether an engine may be silent for long though it works on ``job``: on all but plain text."""
    if job.path not in (CHAT_PATH, COMPLETIONS_PATH):
        return True
    try:
        request = orjson.loads(job.body)
    except orjson.JSONDecodeError:
        return True
    return type(request) is not dict or any(request.get(field) is not None for field in _HOLDING_BACK)


@dataclass(slots=True)
class StreamStall:
    """One stream. ``pieces`` counts what came of it and ``reading`` says whether somebody waits for more: both are
    written where the stream is read, and looked at from time to time."""

    pieces: int = 0
    reading: bool = False
    _counted: int = -1
    _since: float = 0.0
    _looked: float = 0.0

    @property
    def has_said_little(self) -> bool:
        """Whether what came may be the beginning alone, which some engines send before they read the prompt."""
        return self.pieces < 2

    def is_stuck(self, now: float, others_at: float, limit_s: float) -> bool:
        """Look at ``now`` (s); ``others_at`` is when anything last came of any stream or answer of this worker."""
        unseen = now - self._looked > max(limit_s * _MAX_GAP, _MIN_GAP_S)
        self._looked = now
        if self.pieces != self._counted or not self.reading or unseen:
            self._counted = self.pieces
            self._since = now
        return self.pieces > 0 and others_at - self._since >= limit_s
