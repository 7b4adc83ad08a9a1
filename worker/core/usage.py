"""Read from the last bytes of an engine's answer what it has used, and say what that costs.

Called by :mod:`worker.attempts.answer_relay`. No body is parsed. A figure that cannot be a number of tokens (negative,
text, a fraction, more than any model has) counts as not given.
"""

from __future__ import annotations

import re

from queue_schemas.records import record
from scheduling.cost import MAX_TOKENS, Usage, cost_of, prompt_tokens

_WINDOW_BYTES = 2048
_NUMBER = rb'"\s*:\s*(\d{1,9})(?![\d.eE])'
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens' + _NUMBER)
_OUTPUT = re.compile(rb'"(?:completion|output)_tokens' + _NUMBER)
_CACHED = re.compile(rb'"(?:cached_tokens|cache_read_input_tokens)' + _NUMBER)


@record
class AnswerUsage:
    """Tokens of one answer; None where the engine does not say. ``cached`` are those of ``prompt`` that came from its
    prefix cache."""

    prompt: int | None
    output: int | None
    cached: int

    def cost(self, body: bytes) -> int | None:
        """What the answer to the request ``body`` has cost; None if nothing is known of it."""
        if self.prompt is None and self.output is None:
            return None
        prompt = prompt_tokens(body) if self.prompt is None else self.prompt
        return cost_of(Usage(prompt, self.output or 0, self.cached))


def read_usage(end: bytes, events: int = 0) -> AnswerUsage:
    """The usage in an answer whose last bytes are ``end``; without output tokens in it, a stream's ``events``."""
    start = max(len(end) - _WINDOW_BYTES, 0)
    start = max(end.rfind(b'"usage"', start), start)
    prompt, output = (_tokens(pattern, end, start) for pattern in (_PROMPT, _OUTPUT))
    cached = _tokens(_CACHED, end, start) or 0
    return AnswerUsage(prompt, output if output is not None else events or None, cached if prompt else 0)


def _tokens(pattern: re.Pattern[bytes], end: bytes, start: int) -> int | None:
    found = pattern.search(end, start)
    tokens = int(found[1]) if found else None
    return tokens if tokens is not None and tokens <= MAX_TOKENS else None
