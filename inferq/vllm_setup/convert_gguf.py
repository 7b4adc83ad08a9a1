"""Turn a GGUF file into a Hugging Face folder of bf16 safetensors, which vLLM loads on every platform.

Runs with the Python of the vLLM environment, as a script: ``python convert_gguf.py MODEL.gguf FOLDER``. Nothing else of
inferq is imported there, and nothing is fetched from anywhere.
"""

import json
import sys
from pathlib import Path

import torch
import transformers


def convert(source: Path, folder: Path) -> None:
    """Dequantise ``source`` into ``folder`` (created): config, weights, tokenizer with its chat template."""
    given: dict[str, object] = {"gguf_file": source.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):
        # From transformers 5.19 on, a GGUF stays quantised unless asked otherwise.
        given["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(source.parent, **given)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text())
    config.pop("quantization_config", None)
    config_path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
