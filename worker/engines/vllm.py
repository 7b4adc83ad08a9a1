"""Start vLLM as a subprocess: find its command, and build its arguments and environment.

On a machine without an accelerator the CPU build is assumed and given what it needs; all of it can be overridden by
the environment, which wins (vLLM's own documentation: "CPU", "Environment Variables").
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from openai_api.media import ANY_HOST
from queue_schemas import CannotStart

from .process import HOST, Launch

Device = Literal["auto", "cpu", "gpu"]
OWN_ENVIRONMENT = Path(".inferq/vllm/bin/vllm")
"""Where ``make up`` installs the CPU build."""
_ACCELERATORS = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dri/renderD128")

_ALWAYS = {
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONUNBUFFERED": "1",
    # A host that may be fetched from must not send vLLM on to one that may not.
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
}
_NO_HOST = "media.invalid"
"""A name that no host can have (RFC 2606): an empty list means every host to vLLM."""
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
_ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # One process fewer and half the start time; there is no device to keep busy meanwhile.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Two servers on one machine would otherwise pin themselves to the same core.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
_LOADS_ADAPTERS = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
_CPU_ARGUMENTS = ("--enforce-eager", "--distributed-executor-backend", "uni")


def find_vllm(command: str) -> str:
    """The ``vllm`` executable: ``command`` if given, else from PATH, else the one in ``.inferq``.

    Raises ``CannotStart`` with what to do if there is none.
    """
    if command:
        found = shutil.which(command)
        if found is None:
            raise CannotStart(f"there is no executable {command}: correct --vllm-command (INFERQ_WORKER_VLLM_COMMAND)")
        return found
    found = shutil.which("vllm")
    if found is not None:
        return found
    if OWN_ENVIRONMENT.is_file():
        return str(OWN_ENVIRONMENT.absolute())
    raise CannotStart(
        "vLLM is not installed here: run `make up` once, or install it (pip install vllm) and put it on PATH, or name "
        "it with --vllm-command; or serve another engine with --engine-url URL, or the simulated one with --engine sim"
    )


def has_accelerator() -> bool:
    """Whether this machine shows a device that vLLM's GPU builds use."""
    return any(os.path.exists(device) for device in _ACCELERATORS)  # noqa: PTH110 - a test of presence, no more


def vllm_launch(
    executable: str,
    model: str,
    *,
    served_name: str = "",
    device: Device = "auto",
    media_domains: Sequence[str] = (),
    max_adapters: int = 0,
    arguments: Sequence[str] = (),
) -> Callable[[int], Launch]:
    """How to serve ``model`` (a model id or a folder) on a given port. ``arguments`` go to ``vllm serve`` last.
    ``max_adapters``: of LoRA adapters that are loaded while it serves; 0: none can be.

    It fetches media from ``media_domains`` alone, without following redirects; ``*`` is any host.
    """
    on_cpu = device == "cpu" or (device == "auto" and not has_accelerator())
    local = Path(model).is_dir()

    def launch(port: int) -> Launch:
        command = [executable, "serve", model, "--host", HOST, "--port", str(port)]
        if served_name:
            command += ["--served-model-name", served_name]
        if ANY_HOST not in media_domains:
            command += ["--allowed-media-domains", *(map(str.lower, media_domains) if media_domains else (_NO_HOST,))]
        if max_adapters:
            command += ["--enable-lora", "--max-loras", str(max_adapters)]
        if on_cpu:
            command += _CPU_ARGUMENTS
        environment = _ALWAYS | (_OFFLINE if local else {}) | (_ON_CPU if on_cpu else {})
        environment |= _LOADS_ADAPTERS if max_adapters else {}
        return Launch((*command, *arguments), environment)

    return launch
