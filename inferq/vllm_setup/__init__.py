"""vLLM on this machine: an environment of its own, made once, and a small real model for those who name none."""

from .environment import VllmEnvironment, find_vllm, prepare_vllm
from .model import DEFAULT_MODEL, find_default_model, prepare_default_model
from .plan import Host, Kind, Plan, SetupFailed, plan_setup
from .progress import ConsoleProgress, Progress

__all__ = [
    "DEFAULT_MODEL",
    "ConsoleProgress",
    "Host",
    "Kind",
    "Plan",
    "Progress",
    "SetupFailed",
    "VllmEnvironment",
    "find_default_model",
    "find_vllm",
    "plan_setup",
    "prepare_default_model",
    "prepare_vllm",
]
