"""The options of ``inferq simulate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

_TRACE, _FLEET, _ENGINE, _OUTPUT = "Trace", "Policies and fleet", "Engine", "Objectives and output"


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """Which requests."""

    limit: Annotated[
        int | None, typer.Option(min=1, help="First requests of the trace only.", rich_help_panel=_TRACE)
    ] = None
    speed: Annotated[float, typer.Option(min=1e-6, help="How many times as fast.", rich_help_panel=_TRACE)] = 1.0
    copies: Annotated[
        int,
        typer.Option(min=1, help="How many times as many requests, in copies at most a minute apart.",
                     rich_help_panel=_TRACE),
    ] = 1  # fmt: skip
    seed: Annotated[int, typer.Option(help="Of generated traces.", rich_help_panel=_TRACE)] = 0


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """What is compared."""

    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="inferq, round-robin, least-loaded, bounded-hashing or oracle; repeatable (default: all).",
            rich_help_panel=_FLEET,
        ),
    ] = None
    fleet: Annotated[
        list[str] | None,
        typer.Option(
            help="fixed, inferq, lag-count, queue-length or clairvoyant: its size; repeatable (default: fixed).",
            rich_help_panel=_FLEET,
        ),
    ] = None
    workers: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Size of a fixed fleet; repeatable (default: 4).", rich_help_panel=_FLEET),
    ] = None
    min_workers: Annotated[
        int, typer.Option(min=0, help="Fewest workers of a fleet that scales.", rich_help_panel=_FLEET)
    ] = 1
    max_workers: Annotated[
        int, typer.Option(min=1, help="Most workers of a fleet that scales.", rich_help_panel=_FLEET)
    ] = 64
    lag_threshold: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="lag-count, queue-length: requests for each worker; repeatable (default: 10).",
            rich_help_panel=_FLEET,
        ),
    ] = None
    target_wait_ms: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            help="inferq's autoscaler: longest wait to plan for; repeatable (default: 2000).",
            rich_help_panel=_FLEET,
        ),
    ] = None
    scale_in_after_s: Annotated[
        float, typer.Option(min=0, help="inferq's autoscaler: fewer workers only after.", rich_help_panel=_FLEET)
    ] = 60.0
    without: Annotated[
        list[str] | None,
        typer.Option(help="inferq: affinity, fairness, preemption or slots; repeatable.", rich_help_panel=_FLEET),
    ] = None
    max_slots: Annotated[
        int | None,
        typer.Option(min=1, help="inferq: most slots of a worker that adapts them.", rich_help_panel=_FLEET),
    ] = None
    max_yields: Annotated[
        int, typer.Option(min=1, help="inferq: how often a batch's request yields.", rich_help_panel=_FLEET)
    ] = 3
    slots: Annotated[
        int, typer.Option(min=1, help="inferq: requests that a worker begins with.", rich_help_panel=_FLEET)
    ] = 32
    hop_ms: Annotated[float, typer.Option(min=0, help="From the decision to the engine.", rich_help_panel=_FLEET)] = 2.0
    weight: Annotated[
        list[str] | None,
        typer.Option(metavar="TENANT=WEIGHT", help="A tenant's share; repeatable (others: 1).", rich_help_panel=_FLEET),
    ] = None


@dataclass(frozen=True, slots=True)
class EngineModelOptions:
    """How fast an engine is."""

    engine: Annotated[
        str,
        typer.Option(help="h100-llama-3.1-8b, a100-llama-3.1-8b or simulated; the options below change it.",
                     rich_help_panel=_ENGINE),
    ] = "h100-llama-3.1-8b"  # fmt: skip
    step_us: Annotated[float | None, typer.Option(min=0, help="Time of a step.", rich_help_panel=_ENGINE)] = None
    prefill_us: Annotated[
        float | None, typer.Option(min=0, help="More for each prompt token in it.", rich_help_panel=_ENGINE)
    ] = None
    sequence_us: Annotated[
        float | None, typer.Option(min=0, help="More for each decoding sequence.", rich_help_panel=_ENGINE)
    ] = None
    kv_us: Annotated[
        float | None, typer.Option(min=0, help="More for each token that they have.", rich_help_panel=_ENGINE)
    ] = None
    step_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a step (max_num_batched_tokens).", rich_help_panel=_ENGINE)
    ] = None
    max_seqs: Annotated[
        int | None, typer.Option(min=1, help="Most requests that run at once (max_num_seqs).", rich_help_panel=_ENGINE)
    ] = None
    kv_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the KV cache holds.", rich_help_panel=_ENGINE)
    ] = None
    offload_tokens: Annotated[
        int | None, typer.Option(min=0, help="Tokens of its blocks in the host's memory.", rich_help_panel=_ENGINE)
    ] = None
    start_s: Annotated[
        float | None, typer.Option(min=0, help="Time that a worker needs to start.", rich_help_panel=_ENGINE)
    ] = None
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of an engine.", rich_help_panel=_ENGINE)] = None


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """What is good, and where it is shown."""

    ttft_ms: Annotated[
        float, typer.Option(min=0, help="Objective: time to the first token.", rich_help_panel=_OUTPUT)
    ] = 2000.0
    tpot_ms: Annotated[
        float, typer.Option(min=0, help="Objective: mean time of each further token.", rich_help_panel=_OUTPUT)
    ] = 50.0
    deadline_ms: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Count whom admission would refuse if requests had to start within this.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw the figures; needs the extra 'plot'.", rich_help_panel=_OUTPUT),
    ] = None
