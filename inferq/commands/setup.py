"""``inferq setup``: prepare vLLM and its default model, without starting anything."""

from __future__ import annotations

from inferq.console import err, out, print_json
from inferq.vllm_setup import DEFAULT_MODEL, ConsoleProgress, prepare_default_model, prepare_vllm


def set_up(*, as_json: bool) -> None:
    """Prepare both; says where they are. Raises ``SetupFailed`` with the reason why they cannot be."""
    progress = ConsoleProgress(err)
    environment = prepare_vllm(progress)
    model = prepare_default_model(environment, progress)
    if as_json:
        print_json({"vllm": str(environment.command), "device": environment.device, "model": str(model)})
    else:
        out.print(
            f"vLLM for the {environment.device.upper()}: {environment.command}\n{DEFAULT_MODEL}: {model}", markup=False
        )
