"""Make the engine that the worker's settings name."""

from __future__ import annotations

import sys
from collections.abc import Callable

from worker.settings import WorkerSettings

from .dialects import DIALECTS
from .http import HttpEngine
from .port import Engine
from .process import HOST, Launch, ProcessEngine
from .vllm import find_vllm, vllm_launch


def make_engine(settings: WorkerSettings, restarted: Callable[[], None] = lambda: None) -> Engine:
    """The engine of ``settings``, not started yet. ``restarted`` is called at each start after the first.

    Raises ``CannotStart`` if it cannot be had here.
    """
    match settings.engine_kind:
        case "url":
            return HttpEngine(
                settings.engine_url,
                api_key=settings.engine_api_key.get_secret_value(),
                dialect=DIALECTS.get(settings.engine_dialect),
            )
        case "sim":
            # Loaded by the workers that run it alone: 2 MB.
            from .simulated import SimulatedEngine  # noqa: PLC0415
            from .simulated.options import read_options  # noqa: PLC0415

            return SimulatedEngine(read_options(_sim_arguments(settings, settings.model))[2])
        case "sim-process":
            name = "the simulated engine"
            launches = {model: _sim_launch(settings, model) for model in settings.installed}
        case "vllm":
            name = "vLLM"
            launches = {
                served: vllm_launch(
                    find_vllm(settings.vllm_command),
                    model,
                    served_name="" if served == model else served,
                    device=settings.vllm_device,
                    media_domains=settings.media_domains,
                    max_adapters=settings.max_adapters if settings.adapters_dir and model == settings.model else 0,
                    arguments=settings.vllm_args,
                )
                for served, model in settings.installed.items()
            }
    return ProcessEngine(
        name,
        launches,
        ready_timeout_s=settings.engine_ready_timeout_ms / 1000,
        stable_after_s=settings.engine_stable_after_ms / 1000,
        stop_timeout_s=settings.engine_stop_timeout_ms / 1000,
        log_file=settings.engine_log_dir / f"{settings.name}.engine.log",
        restarted=restarted,
    )


def _sim_arguments(settings: WorkerSettings, models: str) -> list[str]:
    names = [part for name in models.split(",") if name for part in ("--model", name.strip())]
    return [*names, *settings.sim_args]


def _sim_launch(settings: WorkerSettings, models: str) -> Callable[[int], Launch]:
    command = (sys.executable, "-m", "worker.engines.simulated", *_sim_arguments(settings, models))
    return lambda port: Launch((*command, "--host", HOST, "--port", str(port)), {"PYTHONUNBUFFERED": "1"})
