"""SGLang's ways.

Source: ``entrypoints/http_server.py``, ``entrypoints/openai/`` (``serving_tokenize.py``, ``serving_chat.py``,
``protocol.py``) and ``observability/metrics_collector.py`` of SGLang 0.5.23.

* Health: ``/health`` answers 503 while it starts and when its scheduler has stopped. It waits for a step of the
  scheduler, or has it generate a token, and so takes a second or more.
* Metrics: only with ``--enable-metrics``. Gauges appear with the first work. Its token counters move when a request
  ends; the figures of its log interval move while it works. With ``--enable-metrics-for-all-schedulers`` each rank
  tells its own, which are added up: then it seems to hold more than it does.
* Continuation: ``continue_final_message`` alone. Together with ``add_generation_prompt``, its ``/tokenize`` refuses it.
  Older versions tokenize no chats, and start them again. ``/detokenize`` leaves special tokens out unless it is told
  not to.
* A closed connection aborts a request: a stream two seconds later, when it has been held to be over.
"""

from __future__ import annotations

import re

from queue_schemas import Job
from scheduling.slots import EngineLoad

from ...core.continuation import Continuation, ContinuationRules
from ...core.metric_samples import MAX_REQUESTS, MAX_TOTAL, fullest, read_samples, sample_pattern, total
from .port import AdapterPaths, Ask
from .progress import digest
from .prompts import plan_by_tokens

_LOAD = sample_pattern(
    "sglang:num_queue_reqs", "sglang:num_running_reqs", "sglang:token_usage", "sglang:num_retracted_requests_total"
)
_PROGRESS = re.compile(
    rb"^sglang:(?:(?:generation_tokens|prompt_tokens|num_requests|realtime_tokens)_total"
    rb"|num_used_tokens|token_usage|gen_throughput)(?:\{[^}]*\})? [0-9.e+-]+",
    re.MULTILINE,
)
_RULES = ContinuationRules({"continue_final_message": True})


class SglangDialect:
    """SGLang's server, ``python -m sglang.launch_server``."""

    name = "sglang"
    health_path = "/health"
    metrics_path = "/metrics"
    tells_load_late = True
    adapter_paths = AdapterPaths(
        "/load_lora_adapter", "/unload_lora_adapter", "start SGLang with --enable-lora and --max-lora-rank"
    )

    def read_load(self, page: bytes) -> EngineLoad | None:
        values = read_samples(_LOAD, page)
        waiting = total(values.get("sglang:num_queue_reqs", ()), MAX_REQUESTS)
        if waiting is None:
            return None
        return EngineLoad(
            waiting=waiting,
            running=total(values.get("sglang:num_running_reqs", ()), MAX_REQUESTS),
            kv_usage=fullest(values.get("sglang:token_usage", ())),
            preemptions=total(values.get("sglang:num_retracted_requests_total", ()), MAX_TOTAL),
        )

    def read_progress(self, page: bytes) -> int | None:
        return digest(_PROGRESS, page)

    async def plan(self, job: Job, ask: Ask) -> Continuation:
        return await plan_by_tokens(job, ask, _RULES, text_field="text", detokenize={"skip_special_tokens": False})
