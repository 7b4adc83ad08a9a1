"""Make the engine that the worker's settings name."""

from __future__ import annotations

import sys
from collections.abc import Callable

from worker.settings import WorkerSettings

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
            return HttpEngine(settings.engine_url, api_key=settings.engine_api_key.get_secret_value())
        case "sim":
            # Loaded by the workers that run it alone: 2 MB.
            from .simulated import SimulatedEngine  # noqa: PLC0415
            from .simulated.options import read_options  # noqa: PLC0415

            return SimulatedEngine(read_options(_sim_arguments(settings))[2])
        case "sim-process":
            command = (sys.executable, "-m", "worker.engines.simulated", *_sim_arguments(settings))
            launch = _sim_launch(command)
            name = "the simulated engine"
        case "vllm":
            launch = vllm_launch(
                find_vllm(settings.vllm_command),
                settings.model,
                served_name=settings.served_model_name,
                device=settings.vllm_device,
                media_domains=settings.media_domains,
                arguments=settings.vllm_args,
            )
            name = "vLLM"
    return ProcessEngine(
        name,
        launch,
        ready_timeout_s=settings.engine_ready_timeout_ms / 1000,
        stable_after_s=settings.engine_stable_after_ms / 1000,
        stop_timeout_s=settings.engine_stop_timeout_ms / 1000,
        log_file=settings.engine_log_dir / f"{settings.name}.engine.log",
        restarted=restarted,
    )


def _sim_arguments(settings: WorkerSettings) -> list[str]:
    models = [part for name in settings.model.split(",") if name for part in ("--model", name.strip())]
    return [*models, *settings.sim_args]


def _sim_launch(command: tuple[str, ...]) -> Callable[[int], Launch]:
    return lambda port: Launch((*command, "--host", HOST, "--port", str(port)), {"PYTHONUNBUFFERED": "1"})
