"""The options of a simulated engine, for its own command line and the worker's ``--sim-...`` flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .failures import FailureKind, parse_rates
from .settings import SimulationSettings


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``python -m worker.engines.simulated``."""
    default = SimulationSettings()
    parser = argparse.ArgumentParser(
        prog="python -m worker.engines.simulated",
        description="A simulated OpenAI-compatible engine: deterministic text, timing and failures to order.",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one; the port is printed")
    parser.add_argument(
        "--model", action="append", dest="models", help=f"may be repeated (default {default.models[0]})"
    )
    parser.add_argument(
        "--adapter", action="append", dest="adapters", default=[], help="a LoRA adapter's name; repeatable"
    )
    parser.add_argument("--mode", choices=("text", "echo"), default=default.mode)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--name", default=default.name, help="what the 'on' of a failure order may name")
    parser.add_argument("--answer-tokens", type=int, default=default.answer_tokens, help="mean length of an answer")
    parser.add_argument("--max-model-len", type=int, default=default.max_model_len, help="tokens")
    parser.add_argument("--max-num-seqs", type=int, default=default.max_num_seqs, help="requests that run at once")
    parser.add_argument("--ttft-ms", type=float, default=default.ttft_ms, help="time to the first token")
    parser.add_argument("--prefill-us-per-token", type=float, default=default.prefill_us_per_token)
    parser.add_argument("--tokens-per-s", type=float, default=default.tokens_per_s, help="per stream; 0: no limit")
    parser.add_argument("--no-lockstep", action="store_true", help="streams do not get their tokens in one step")
    parser.add_argument("--serial-prefill", action="store_true", help="prompts are computed one after another")
    parser.add_argument("--block-tokens", type=int, default=default.block_tokens, help="of a prefix cache block")
    parser.add_argument("--prefix-cache-blocks", type=int, default=default.prefix_cache_blocks, help="0: no cache")
    parser.add_argument(
        "--kv-cache-tokens", type=int, default=default.kv_cache_tokens, help="of running requests; 0: no bound"
    )
    parser.add_argument("--embedding-dimensions", type=int, default=default.embedding_dimensions)
    parser.add_argument("--nondeterministic", action="store_true", help="words are drawn anew for each request")
    parser.add_argument("--template-trims", action="store_true", help="the chat template strips what is to go on")
    parser.add_argument("--no-tokenize", action="store_true", help="there is no /tokenize and no /detokenize")
    parser.add_argument("--no-adapter-updates", action="store_true", help="adapters cannot be loaded while it serves")
    parser.add_argument("--adapter-load-ms", type=float, default=default.adapter_load_ms, help="of each adapter")
    parser.add_argument("--max-adapters", type=int, default=default.max_adapters, help="that are loaded at once")
    parser.add_argument("--start-ms", type=float, default=0.0, help="time until it is ready")
    parser.add_argument("--never-ready", action="store_true")
    kinds = ", ".join(FailureKind)
    parser.add_argument("--fail-rate", default="", metavar="KIND=SHARE,...", help=f"share that fails: {kinds}")
    parser.add_argument("--instant", action="store_true", help="no TTFT, no prefill time, no limit on tokens/s")
    return parser


def read_options(argv: Sequence[str] | None = None) -> tuple[str, int, SimulationSettings]:
    """Host, port and settings from ``argv``. Ends the process with a sentence if they make no sense."""
    parser = build_parser()
    options = parser.parse_args(argv)
    try:
        settings = SimulationSettings(
            models=tuple(options.models or SimulationSettings().models),
            adapters=tuple(options.adapters),
            mode=options.mode,
            seed=options.seed,
            name=options.name,
            answer_tokens=options.answer_tokens,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            ttft_ms=0.0 if options.instant else options.ttft_ms,
            prefill_us_per_token=0.0 if options.instant else options.prefill_us_per_token,
            tokens_per_s=0.0 if options.instant else options.tokens_per_s,
            lockstep=not options.no_lockstep,
            serial_prefill=options.serial_prefill,
            block_tokens=options.block_tokens,
            prefix_cache_blocks=options.prefix_cache_blocks,
            kv_cache_tokens=options.kv_cache_tokens,
            embedding_dimensions=options.embedding_dimensions,
            start_ms=None if options.never_ready else options.start_ms,
            nondeterministic=options.nondeterministic,
            template_trims=options.template_trims,
            tokenizes=not options.no_tokenize,
            adapter_updates=not options.no_adapter_updates,
            adapter_load_ms=options.adapter_load_ms,
            max_adapters=options.max_adapters,
            failure_rates=parse_rates(options.fail_rate),
        )
    except ValueError as error:
        parser.error(str(error))
    return options.host, options.port, settings
