"""Read an engine's load from its metrics page: Prometheus text under vLLM's names (its docs, "Production Metrics").

Series of several engine cores (data parallelism) are added up; of their KV caches the fullest counts. A page that says
nothing of what waits, or something impossible, gives no load; another impossible figure is left out.
"""

from __future__ import annotations

import math
import re

from scheduling.slots import EngineLoad

from .metric_samples import MAX_REQUESTS, MAX_TOTAL, fullest, number, total

_SAMPLE = re.compile(
    rb"^vllm:(num_requests_waiting(?:_by_reason)?|num_requests_running|(?:kv|gpu)_cache_usage_perc|num_preemptions_total"
    rb"|(?:gpu_|external_)?prefix_cache_(?:queries|hits)_total|generation_tokens_total|cache_config_info)"
    rb"(\{[^\n]*\})? ([^ \r\n]{1,40})",
    re.MULTILINE,
)
_CONFIG = re.compile(rb'[{,](block_size|num_gpu_blocks|enable_prefix_caching)="([0-9]{1,12}|False)"')
_RENAMED = {
    b"gpu_cache_usage_perc": b"kv_cache_usage_perc",
    b"gpu_prefix_cache_queries_total": b"prefix_cache_queries_total",
    b"gpu_prefix_cache_hits_total": b"prefix_cache_hits_total",
}
"""vLLM's names before 0.11, and what they are called since."""
_DEFERRED = b'reason="deferred"'
"""vLLM's word for requests that wait for something else than room."""


def read_load(page: bytes) -> EngineLoad | None:
    """The load that ``page`` tells; None if it does not tell what waits, or cannot be true."""
    values: dict[bytes, list[float]] = {}
    caches: list[float] = []
    deferred = 0.0
    for name, labels, text in _SAMPLE.findall(page):
        value = number(text)
        if name == b"cache_config_info":
            caches.append(_cache_tokens(labels))
        elif not name.endswith(b"_by_reason"):
            values.setdefault(name, []).append(value)
        elif _DEFERRED in labels and 0 <= value <= MAX_REQUESTS:
            deferred += value
    for old, new in _RENAMED.items():  # some versions tell both
        values.setdefault(new, values.get(old, []))
    waiting = total(values.get(b"num_requests_waiting", ()), MAX_REQUESTS)
    if waiting is None:
        return None
    return EngineLoad(
        waiting=max(waiting - int(deferred), 0),
        running=total(values.get(b"num_requests_running", ()), MAX_REQUESTS),
        kv_usage=fullest(values.get(b"kv_cache_usage_perc", ())),
        preemptions=total(values.get(b"num_preemptions_total", ()), MAX_TOTAL),
        prefix_queries=total(values.get(b"prefix_cache_queries_total", ()), MAX_TOTAL),
        prefix_hits=total(values.get(b"prefix_cache_hits_total", ()), MAX_TOTAL),
        generated=total(values.get(b"generation_tokens_total", ()), MAX_TOTAL),
        # Behind a cache outside of the engine (a connector's), nobody says how much is held.
        cache_tokens=None if any(values.get(b"external_prefix_cache_queries_total", ())) else total(caches, MAX_TOTAL),
    )


def _cache_tokens(labels: bytes) -> float:
    """How many tokens one KV cache holds, 0 if it keeps no prefixes; NaN where its labels do not say."""
    config = dict(_CONFIG.findall(labels))
    if config.get(b"enable_prefix_caching") == b"False":
        return 0.0
    try:
        return float(config[b"block_size"]) * float(config[b"num_gpu_blocks"])
    except (KeyError, ValueError):
        return math.nan
