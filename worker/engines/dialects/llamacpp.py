"""The ways of llama.cpp's own server, ``llama-server``.

Source: ``tools/server/README.md``, ``server-context.cpp`` and ``server-common.cpp`` of llama.cpp 0.5.0;
checked against that server itself (``tests/llamacpp``). llama-cpp-python's server is another one.

* Health: ``/health`` answers 503 while the model is loaded.
* Metrics: only with ``--metrics``, else 501. Newer versions tell no KV usage. Its slots are ``--parallel``.
* Continuation: a chat goes on behind its last message by itself, but then the answer repeats that message. It does not
  where ``continue_final_message`` says ``content``, a word of May 2026 (pull request 23089). A server that knows it
  refuses it together with ``add_generation_prompt``, and so is told from an older one, whose chats start again.
  ``/apply-template`` says the text of a prompt, ``/tokenize`` counts its tokens. A completion without ``max_tokens``
  fills the context.
* A closed connection aborts a stream at its next token. A plain request is aborted only after a second in which the
  server had no result for anybody (``server-queue.cpp``, ``recv_with_timeout``): beside streams it runs to its end.
* It loads adapters only at its start.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from openai_api.paths import CHAT_PATH
from queue_schemas import Job
from scheduling.slots import EngineLoad

from ...core.continuation import Continuation, ContinuationRules, prompt_requests
from ...core.metric_samples import MAX_REQUESTS, fullest, read_samples, sample_pattern, total
from .port import Ask, NotContinuable
from .progress import digest
from .prompts import ask_fields, check_texts, plan_of, text_of

_LOAD = sample_pattern("llamacpp:requests_deferred", "llamacpp:requests_processing", "llamacpp:kv_cache_usage_ratio")
_PROGRESS = re.compile(
    rb"^llamacpp:(?:prompt_tokens_total|tokens_predicted_total|n_decode_total)(?:\{[^}]*\})? [0-9.e+-]+", re.MULTILINE
)
_TEMPLATE = "/apply-template"
_RULES = ContinuationRules({"continue_final_message": "content", "add_generation_prompt": False}, None)


class LlamacppDialect:
    """``llama-server``."""

    name = "llamacpp"
    health_path = "/health"
    metrics_path = "/metrics"
    tells_load_late = False
    adapter_paths = None

    def read_load(self, page: bytes) -> EngineLoad | None:
        values = read_samples(_LOAD, page)
        waiting = total(values.get("llamacpp:requests_deferred", ()), MAX_REQUESTS)
        if waiting is None:
            return None
        return EngineLoad(
            waiting=waiting,
            running=total(values.get("llamacpp:requests_processing", ()), MAX_REQUESTS),
            kv_usage=fullest(values.get("llamacpp:kv_cache_usage_ratio", ())),
        )

    def read_progress(self, page: bytes) -> int | None:
        return digest(_PROGRESS, page)

    async def plan(self, job: Job, ask: Ask) -> Continuation:
        original, continued = prompt_requests(job, _RULES)
        if job.path == CHAT_PATH:
            refused = await ask(_TEMPLATE, continued | {"add_generation_prompt": True})
            if refused.status != 400:
                raise NotContinuable("it may repeat what was delivered: it does not know continue_final_message")
        before, behind = [await _text(job, ask, request) for request in (original, continued)]
        check_texts(job, before, behind)
        lengths = [await _count(job, ask, text) for text in (before, behind)]
        return plan_of(job, _RULES, *lengths)


async def _text(job: Job, ask: Ask, request: Mapping[str, object]) -> str:
    """The prompt that it makes of ``request``."""
    if job.path != CHAT_PATH:
        return str(request["prompt"])
    return text_of(await ask_fields(ask, _TEMPLATE, request), "prompt")


async def _count(job: Job, ask: Ask, text: str) -> int:
    """The tokens of ``text``, as its prompts are tokenized."""
    request = {"model": job.model, "content": text, "add_special": True, "parse_special": True}
    tokens = (await ask_fields(ask, "/tokenize", request)).get("tokens")
    if type(tokens) is not list:
        raise NotContinuable("its /tokenize answers something else than tokens")
    return len(tokens)
