"""Read requests that load or unload a LoRA adapter while the engine serves: vLLM's checks and words.

An adapter is a folder with an ``adapter_config.json``. A field ``sim`` in it, which no real adapter has, orders how its
load fails, as in a request (:mod:`worker.engines.simulated.failures`).
"""

from __future__ import annotations

from pathlib import Path

import orjson

from ..failures import Failure, parse_order
from .refusal import Fields, RefusedRequest
from .requests import parse_object

CONFIG_FILE = "adapter_config.json"


def parse_load(body: bytes, loaded: tuple[str, ...], limit: int) -> tuple[str, Failure | None]:
    """The adapter to load beside those ``loaded``, of which there may be ``limit``, and the failure that is ordered."""
    fields = parse_object(body)
    name, path = (_text(fields, field) for field in ("lora_name", "lora_path"))
    if not name or not path:
        raise RefusedRequest("Both 'lora_name' and 'lora_path' must be provided.", kind="InvalidUserInput")
    if name in loaded:
        raise RefusedRequest(
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
            "'load_inplace' to True.",
            kind="InvalidUserInput",
        )
    if len(loaded) >= limit:
        raise RefusedRequest(f"There are {limit} adapters, and no room for another one.", kind="InvalidUserInput")
    try:
        config = orjson.loads((Path(path) / CONFIG_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise RefusedRequest(f"Loading lora {name} failed: No adapter found for {path}", status=404) from error
    order = fields.get("sim", config.get("sim") if isinstance(config, dict) else None)
    try:
        return name, None if order is None else parse_order(order)
    except ValueError as error:
        raise RefusedRequest(str(error), param="sim") from error


def parse_unload(body: bytes, loaded: tuple[str, ...]) -> str:
    """The adapter to unload."""
    name = _text(parse_object(body), "lora_name")
    if not name:
        raise RefusedRequest(
            "'lora_name' needs to be provided to unload a LoRA adapter.", kind="InvalidUserInput", param="lora_name"
        )
    if name not in loaded:
        raise RefusedRequest(f"The lora adapter '{name}' cannot be found.", status=404)
    return name


def _text(fields: Fields, name: str) -> str:
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise RefusedRequest(f"{name}: Input should be a valid string", param=name)
    return value
