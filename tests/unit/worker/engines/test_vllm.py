"""How vLLM is found and called."""

from __future__ import annotations

from pathlib import Path

import pytest

from queue_schemas import CannotStart
from worker.engines import vllm
from worker.engines.vllm import find_vllm, vllm_launch


def executable(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "vllm"
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    return file


def test_on_a_cpu_it_gets_what_the_cpu_build_needs() -> None:
    """One process, eager mode, a bounded KV cache, and threads that two servers can share."""
    launch = vllm_launch("/opt/vllm", "org/model", served_name="m", device="cpu", arguments=["--max-model-len", "512"])(
        7
    )
    assert launch.command[:7] == ("/opt/vllm", "serve", "org/model", "--host", "127.0.0.1", "--port", "7")
    assert "--enforce-eager" in launch.command
    assert launch.command[-2:] == ("--max-model-len", "512")
    assert launch.environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert launch.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert launch.environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "HF_HUB_OFFLINE" not in launch.environment


def test_on_an_accelerator_it_is_left_to_vllm() -> None:
    """None of the CPU settings are passed."""
    launch = vllm_launch("/opt/vllm", "org/model", device="gpu")(7)
    assert "--enforce-eager" not in launch.command
    assert not any(name.startswith("VLLM_CPU") for name in launch.environment)


def test_it_fetches_media_from_where_the_settings_say_alone() -> None:
    """[E1] From nowhere unless told so, and without redirects; an empty list of vLLM's own would be every host."""
    assert vllm_launch("/opt/vllm", "m")(7).environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    for domains, expected in (((), ["media.invalid"]), (("a.example", "B.example"), ["a.example", "b.example"])):
        command = vllm_launch("/opt/vllm", "m", device="gpu", media_domains=domains)(7).command
        at = command.index("--allowed-media-domains")
        assert list(command[at + 1 :]) == expected
    assert "--allowed-media-domains" not in vllm_launch("/opt/vllm", "m", media_domains=("*",))(7).command


def test_a_local_model_needs_no_network(tmp_path: Path) -> None:
    """A folder is served offline."""
    assert vllm_launch("/opt/vllm", str(tmp_path))(7).environment["HF_HUB_OFFLINE"] == "1"


def test_it_is_found_by_setting_path_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting wins over PATH, PATH over the environment that ``make up`` makes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "on-path"))
    with pytest.raises(CannotStart, match="make up"):
        find_vllm("")
    own = executable(tmp_path / vllm.OWN_ENVIRONMENT.parent)
    assert find_vllm("") == str(own)
    on_path = executable(tmp_path / "on-path")
    assert find_vllm("") == str(on_path)
    named = executable(tmp_path / "named")
    assert find_vllm(str(named)) == str(named)
    with pytest.raises(CannotStart, match="--vllm-command"):
        find_vllm(str(tmp_path / "missing"))


def test_adapters_are_loaded_while_it_serves_only_where_they_are_wanted() -> None:
    """vLLM has calls for that, which whoever reaches it may make: they are there only then."""
    launch = vllm_launch("/opt/vllm", "m", max_adapters=8, arguments=["--max-loras", "2"])(7)
    at = launch.command.index("--enable-lora")
    assert launch.command[at : at + 3] == ("--enable-lora", "--max-loras", "8")
    assert launch.command[-2:] == ("--max-loras", "2")  # what is given last counts
    assert launch.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    without = vllm_launch("/opt/vllm", "m")(7)
    assert "--enable-lora" not in without.command
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in without.environment
