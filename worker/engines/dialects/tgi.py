"""The ways of Hugging Face's text-generation-inference (TGI).

Source: ``router/src/server.rs``, ``router/src/lib.rs``, ``router/src/infer/chat_template.rs``,
``backends/v3/src/backend.rs`` and ``docs/source/reference/metrics.md`` of TGI 3.3.6, which is in maintenance mode since
December 2025.

* Health: ``/health`` answers 503 when its model does not.
* Metrics: always there; a figure appears when it is first set. They tell no KV usage.
* Continuation: a chat whose last message is the assistant's goes on behind it, but for white space at its end, which is
  cut off. ``/chat_tokenize`` says the text that it makes of a chat, and its tokens; ``/tokenize`` those of a text.
  A completion without ``max_tokens`` fills the context.
* A closed connection aborts a request at the next step of its batch.
* It loads adapters only at its start.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from openai_api.paths import CHAT_PATH
from queue_schemas import Job
from scheduling.slots import EngineLoad

from ...core.continuation import Continuation, ContinuationRules, prompt_requests
from ...core.metric_samples import MAX_REQUESTS, read_samples, sample_pattern, total
from .port import Ask, NotContinuable
from .progress import digest
from .prompts import ask_fields, check_texts, plan_of, read_json, text_of

_LOAD = sample_pattern("tgi_queue_size", "tgi_batch_current_size")
_PROGRESS = re.compile(
    rb"^tgi_(?:batch_inference_count|batch_inference_success|request_success|request_generated_tokens_sum)"
    rb"(?:\{[^}]*\})? [0-9.e+-]+",
    re.MULTILINE,
)
_RULES = ContinuationRules({}, None)


class TgiDialect:
    """``text-generation-launcher``'s server."""

    name = "tgi"
    health_path = "/health"
    metrics_path = "/metrics"
    tells_load_late = True
    adapter_paths = None

    def read_load(self, page: bytes) -> EngineLoad | None:
        values = read_samples(_LOAD, page)
        waiting = total(values.get("tgi_queue_size", ()), MAX_REQUESTS)
        if waiting is None:
            return None
        return EngineLoad(waiting=waiting, running=total(values.get("tgi_batch_current_size", ()), MAX_REQUESTS))

    def read_progress(self, page: bytes) -> int | None:
        return digest(_PROGRESS, page)

    async def plan(self, job: Job, ask: Ask) -> Continuation:
        read = _chat if job.path == CHAT_PATH else _completion
        original, continued = prompt_requests(job, _RULES)
        (before, prompt_tokens), (behind, all_tokens) = await read(ask, original), await read(ask, continued)
        check_texts(job, before, behind)
        return plan_of(job, _RULES, prompt_tokens, all_tokens)


async def _chat(ask: Ask, request: Mapping[str, object]) -> tuple[str, int]:
    """Text and number of tokens of a chat's prompt."""
    answer = await ask_fields(ask, "/chat_tokenize", request)
    return text_of(answer, "templated_text"), _count(answer.get("tokenize_response"))


async def _completion(ask: Ask, request: Mapping[str, object]) -> tuple[str, int]:
    """The same of a completion's."""
    text = str(request["prompt"])
    answer = read_json("/tokenize", await ask("/tokenize", {"inputs": text, "add_special_tokens": True}))
    return text, _count(answer)


def _count(tokens: Any) -> int:
    if type(tokens) is not list:
        raise NotContinuable("it answers something else than tokens")
    return len(tokens)
