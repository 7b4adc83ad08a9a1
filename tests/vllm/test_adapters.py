"""A worker's vLLM loads and unloads LoRA adapters as requests need them."""

from __future__ import annotations

import json
import random
import shlex
import struct
from pathlib import Path

import pytest

from inferq.vllm_setup import DEFAULT_MODEL, VllmEnvironment
from queue_schemas import FABRIC_PREFIX
from tests.support.fleet import Fleet, Role
from tests.support.servers import Server

from .conftest import PRODUCTION_TIMES, until_engine_ready

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(2400)]
RANK = 8


def make_real_adapter(folder: Path, name: str, model_folder: Path) -> None:
    """A LoRA adapter of the model's first layer with random weights, as PEFT writes it."""
    config = json.loads((model_folder / "config.json").read_text())
    width, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    outputs = {"q_proj": width, "v_proj": width // heads * kv_heads}
    numbers = random.Random(name)
    header: dict[str, object] = {}
    data = b""
    for module, output in outputs.items():
        for part, shape in (("lora_A", (RANK, width)), ("lora_B", (output, RANK))):
            count = shape[0] * shape[1]
            weights = struct.pack(f"<{count}f", *(numbers.gauss(0, 0.3) for _ in range(count)))
            header[f"base_model.model.model.layers.0.self_attn.{module}.{part}.weight"] = {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": (len(data), len(data) + len(weights)),
            }
            data += weights
    adapter = folder / name
    adapter.mkdir(parents=True)
    head = json.dumps(header).encode()
    (adapter / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 16, "bias": "none"}
    modules = {"target_modules": list(outputs), "base_model_name_or_path": str(model_folder)}
    (adapter / "adapter_config.json").write_text(json.dumps(about | modules))


async def said(fleet: Fleet, model: str) -> str:
    """What a model answers at temperature 0."""
    body = {
        "model": model,
        "max_tokens": 12,
        "temperature": 0,
        "messages": [{"role": "user", "content": "Say a word."}],
    }
    async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body) as answer:
        page = await answer.json()
        assert answer.status == 200, page
        return str(page["choices"][0]["message"]["content"])


async def loaded(fleet: Fleet) -> list[str]:
    [worker] = (await fleet.manager.page(f"{FABRIC_PREFIX}/workers"))["workers"]
    return sorted(set(worker["models"]) - {DEFAULT_MODEL})


async def test_adapters_are_loaded_and_unloaded_by_demand(
    vllm: VllmEnvironment, model_folder: Path, own_valkey: Server, tmp_path: Path
) -> None:
    """Three with room for two, beside their base model: each says what it said before; one that is no adapter fails
    with vLLM's reason and costs the others nothing."""
    for name in ("red", "green", "blue"):
        make_real_adapter(tmp_path / "adapters", name, model_folder)
    broken = tmp_path / "adapters" / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{}")
    environment = {"OMP_NUM_THREADS": "1"}
    async with Fleet(tmp_path, own_valkey, manager=PRODUCTION_TIMES, env=environment) as fleet:
        worker: Role = fleet.worker(
            "adapted",
            engine="vllm",
            model=model_folder,
            served_model_name=DEFAULT_MODEL,
            vllm_command=vllm.command,
            vllm_device=vllm.device,
            vllm_args=shlex.join(["--max-model-len", "512"]),
            adapters_dir=tmp_path / "adapters",
            max_adapters=2,
            slots=4,
        )
        for role in (fleet.manager, fleet.router, worker):
            role.process.start()
        await fleet.manager.ready()
        await fleet.router.ready()
        await until_engine_ready(worker)
        await fleet.until_served(1, DEFAULT_MODEL)
        base = await said(fleet, DEFAULT_MODEL)
        red, green = await said(fleet, "red"), await said(fleet, "green")
        assert len({base, red, green}) == 3
        assert await loaded(fleet) == ["green", "red"]
        assert await said(fleet, "blue") not in (base, red, green)
        assert len(await loaded(fleet)) == 2
        card = await fleet.router.page("/v1/models/blue")
        assert card["parent"] == DEFAULT_MODEL
        headers = {"x-inferq-deadline-ms": "8000"}
        body = {"model": "broken", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
        async with fleet.session.post(f"{fleet.router.url}/v1/chat/completions", json=body, headers=headers) as answer:
            assert answer.status == 504
        assert "adapter_load_failed" in worker.process.log_text()
        assert (await said(fleet, "red"), await said(fleet, "green")) == (red, green)
        assert await said(fleet, DEFAULT_MODEL) == base
