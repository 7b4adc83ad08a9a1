"""The settings of a simulated engine: a plain record that its command line and the worker's settings build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .failures import FailureKind

Mode = Literal["text", "echo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings:
    """One simulated engine.

    ``adapters`` are LoRA adapters, served beside the base ``models``; the first base model is their parent. ``mode``
    "text" answers words drawn by ``seed`` and prompt behind a digest of the prompt, "echo" answers the last user
    message. ``answer_tokens`` is the mean length of a text answer; a request's ``max_tokens`` cuts it.

    A request waits for one of ``max_num_seqs`` slots, then ``ttft_ms`` plus ``prefill_us_per_token`` for each prompt
    token that the prefix cache does not hold, then gets ``tokens_per_s`` (0: no limit). With ``lockstep`` every running
    stream gets its token in the same engine step, as in a real engine; without, each follows its own clock. With
    ``serial_prefill`` prompts are computed one after another, as where one already keeps a GPU busy.

    With ``kv_cache_tokens`` (0: no bound) a running request holds its tokens, prompt included, in blocks of
    ``block_tokens``: one whose prompt finds no room waits, and when running ones outgrow it, the last that started is
    preempted and computed again. The prefix cache keeps its blocks beside that.

    ``start_ms`` is the time until the engine is ready, None never. ``failure_rates`` is the share of requests (0 to 1)
    that fail in each way, drawn by ``seed`` and the number of the request; ``name`` is what a failure order may name.

    ``nondeterministic`` draws the words of a text answer anew each time. ``template_trims`` is a chat template that
    strips the message that is to go on; ``tokenizes`` is whether there are ``/tokenize`` and ``/detokenize``.

    With ``adapter_updates`` adapters are loaded, ``max_adapters`` at most and each in ``adapter_load_ms``, and unloaded
    while it serves, as vLLM does.
    """

    models: tuple[str, ...] = ("sim",)
    adapters: tuple[str, ...] = ()
    mode: Mode = "text"
    seed: int = 0
    name: str = "sim"
    answer_tokens: int = 32
    max_model_len: int = 32_768
    max_num_seqs: int = 256
    ttft_ms: float = 20.0
    prefill_us_per_token: float = 20.0
    tokens_per_s: float = 100.0
    lockstep: bool = True
    serial_prefill: bool = False
    block_tokens: int = 16
    prefix_cache_blocks: int = 4096
    kv_cache_tokens: int = 0
    embedding_dimensions: int = 384
    start_ms: float | None = 0.0
    nondeterministic: bool = False
    template_trims: bool = False
    tokenizes: bool = True
    adapter_updates: bool = True
    adapter_load_ms: float = 0.0
    max_adapters: int = 1024
    failure_rates: Mapping[FailureKind, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("a simulated engine needs at least one model")
        for name in (
            *("answer_tokens", "max_model_len", "max_num_seqs", "block_tokens", "embedding_dimensions"),
            "max_adapters",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in (
            *("ttft_ms", "prefill_us_per_token", "tokens_per_s", "prefix_cache_blocks", "kv_cache_tokens"),
            "adapter_load_ms",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")
        if 0 < self.kv_cache_tokens < self.max_model_len:
            raise ValueError("kv_cache_tokens must hold one request of max_model_len tokens, or be 0 for no bound")
        if not 0 <= sum(self.failure_rates.values()) <= 1 or any(rate < 0 for rate in self.failure_rates.values()):
            raise ValueError("failure_rates are shares of all requests: each at least 0, together at most 1")

    @property
    def instant(self) -> bool:
        """Whether a request that gets a slot is answered without any wait."""
        return not (self.ttft_ms or self.prefill_us_per_token or self.tokens_per_s)
