"""vLLM's ways, and those of a server that is not known.

Source: vLLM's documentation, "OpenAI-Compatible Server", "Production Metrics" and "LoRA Adapters"; checked against
vLLM 0.32 itself (``tests/vllm``). Many servers have some of these pages, and any may lack some: then a stream starts
again, slots do not adapt, and an answer to any page proves progress.
"""

from __future__ import annotations

import re

from queue_schemas import Job
from scheduling.slots import EngineLoad

from ...core import read_load
from ...core.continuation import Continuation, ContinuationRules
from .port import AdapterPaths, Ask
from .progress import digest
from .prompts import plan_by_tokens

LOAD_PATH = "/v1/load_lora_adapter"
UNLOAD_PATH = "/v1/unload_lora_adapter"
_PROGRESS = re.compile(
    rb"^vllm:(?:(?:generation_tokens|prompt_tokens|request_success)_total"
    rb"|iteration_tokens_total_sum|(?:gpu_|kv_)cache_usage_perc)(?:\{[^}]*\})? [0-9.e+-]+",
    re.MULTILINE,
)
"""What moves while vLLM works. The token counters stand still during a long prefill in chunks: a prompt is counted when
its last one is done; the cache fills up meanwhile."""
_RULES = ContinuationRules({"continue_final_message": True, "add_generation_prompt": False})


class VllmDialect:
    """vLLM, or under another ``name`` a server that may have any of its pages."""

    health_path = "/health"
    metrics_path = "/metrics"
    tells_load_late = False
    adapter_paths = AdapterPaths(
        LOAD_PATH,
        UNLOAD_PATH,
        "start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora",
    )

    def __init__(self, name: str = "vllm") -> None:
        self.name = name

    def read_load(self, page: bytes) -> EngineLoad | None:
        return read_load(page)

    def read_progress(self, page: bytes) -> int | None:
        return digest(_PROGRESS, page)

    async def plan(self, job: Job, ask: Ask) -> Continuation:
        return await plan_by_tokens(job, ask, _RULES, text_field="prompt", detokenize={})
