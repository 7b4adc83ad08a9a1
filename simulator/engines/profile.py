"""How fast an engine is: the parameters of the engine model, and profiles from published fits.

A step of an engine with continuous batching takes
``step_s + prefill_s * (prompt tokens computed in it) + sequence_s * (decoding sequences) + kv_s * (their tokens)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from worker.engines.simulated.schedule import Pace


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProfile:
    """One engine. ``step_tokens`` is what a step computes at most, prompts in chunks and one token for each decoding
    sequence (vLLM's ``max_num_batched_tokens``); ``max_seqs`` run at once (``max_num_seqs``). Its KV cache has room for
    ``kv_tokens``, and the host's memory for ``offload_tokens`` of blocks that nobody uses, which come back in no time.
    It is ready ``start_s`` after it was asked for, and occupies ``gpus``.

    With a ``pace`` it is inferq's simulated engine instead: requests do not slow each other down, ``kv_tokens`` bound
    the prefix cache alone, and the fields of a step mean nothing.
    """

    name: str
    step_s: float = 0.0
    prefill_s: float = 0.0
    sequence_s: float = 0.0
    kv_s: float = 0.0
    step_tokens: int = 8192
    max_seqs: int = 256
    kv_tokens: int = 467_280
    offload_tokens: int = 0
    start_s: float = 60.0
    gpus: int = 1
    pace: Pace | None = None


PROFILES: Mapping[str, EngineProfile] = {
    profile.name: profile
    for profile in (
        # Fits of vLLM 0.8.4 with Llama-3.1-8B-Instruct on one GPU, published by the simulator BLIS (defaults.yaml of
        # https://github.com/inference-sim/inference-sim, commit 1a6eb353): beta coefficients in us, and KV blocks of
        # 16 tokens. They have no term for KV reads: ours is a token's 131,072 bytes (32 layers, 8 KV heads of 128,
        # 16 bits) over the memory's bandwidth (NVIDIA's data sheets: 3.35 and 2.04 TB/s), which is a bound, not a fit.
        # step_tokens are vLLM's defaults for its server on these GPUs; start_s is an assumption.
        EngineProfile(
            name="h100-llama-3.1-8b",
            step_s=5752.7e-6,
            prefill_s=17.251e-6,
            sequence_s=5.999e-6,
            kv_s=0.0391e-6,
            step_tokens=8192,
            kv_tokens=29_205 * 16,
        ),
        EngineProfile(
            name="a100-llama-3.1-8b",
            step_s=16_441.5e-6,
            prefill_s=47.837e-6,
            sequence_s=18.206e-6,
            kv_s=0.0643e-6,
            step_tokens=2048,
            kv_tokens=29_205 * 16,
        ),
        # inferq's simulated engine with the defaults of its command line; its cache holds 4,096 blocks of 16 tokens.
        EngineProfile(
            name="simulated",
            kv_tokens=65_536,
            start_s=1.0,
            pace=Pace(ttft_s=0.02, prefill_s_per_token=20e-6, token_interval_s=0.01, lockstep=True),
        ),
    )
}
"""By name."""
DEFAULT_PROFILE = "h100-llama-3.1-8b"
