"""Folders of LoRA adapters, as the simulated engine reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path


def make_adapter(folder: Path, name: str, order: Mapping[str, object] | None = None) -> Path:
    """The adapter ``name`` below ``folder``; ``order``: how its loads fail."""
    adapter = folder / name
    adapter.mkdir(parents=True, exist_ok=True)
    config: dict[str, object] = {"peft_type": "LORA", "base_model_name_or_path": "sim"}
    (adapter / "adapter_config.json").write_text(json.dumps(config | ({"sim": dict(order)} if order else {})))
    return adapter


def make_adapters(folder: Path, names: Iterable[str]) -> Path:
    """``folder``, with these adapters."""
    for name in names:
        make_adapter(folder, name)
    return folder
