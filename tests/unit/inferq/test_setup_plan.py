"""What is installed where, and why not elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest

from inferq.vllm_setup import Host, Kind, SetupFailed, plan_setup
from inferq.vllm_setup.plan import OFFER, explain_pip

LINUX = Host("Linux", "x86_64", (3, 11), nvidia_gpu=False, free_disk_bytes=100 << 30)
FROZEN = "torch==2.13.0\nvllm-cpu==0.32.0\n"


def test_without_a_gpu_the_frozen_cpu_set_is_installed() -> None:
    """Exactly the frozen set, and nothing that pip would choose itself."""
    plan = plan_setup(LINUX, FROZEN)
    assert plan.kind is Kind.CPU
    assert plan.frozen == FROZEN
    assert plan.requirements == ()
    assert plan.packages == 2


def test_with_a_gpu_vllm_itself_is_installed() -> None:
    """pip install vllm, in a fixed version, and what converts the default model."""
    plan = plan_setup(replace(LINUX, nvidia_gpu=True), FROZEN)
    assert plan.kind is Kind.CUDA
    assert plan.frozen == ""
    assert plan.requirements[0].startswith("vllm==")


def test_another_set_python_or_build_is_another_folder() -> None:
    """An environment is used again only for what it was made for."""
    hosts = [LINUX, replace(LINUX, python=(3, 12)), replace(LINUX, nvidia_gpu=True), replace(LINUX, machine="aarch64")]
    keys = [plan_setup(host, FROZEN).key for host in hosts] + [plan_setup(LINUX, FROZEN + "x==1\n").key]
    assert len(set(keys)) == len(keys)
    assert plan_setup(LINUX, FROZEN).key == plan_setup(replace(LINUX, free_disk_bytes=50 << 30), FROZEN).key


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        (replace(LINUX, system="Darwin"), "it runs on Linux, and this is Darwin"),
        (replace(LINUX, machine="riscv64"), "no build of it for riscv64"),
        (replace(LINUX, python=(3, 14)), "this is 3.14"),
        (replace(LINUX, free_disk_bytes=1 << 30), "1.0 GiB are free"),
        (replace(LINUX, nvidia_gpu=True, free_disk_bytes=10 << 30), "needs 20 GiB"),
    ],
)
def test_an_unfit_machine_gets_a_reason_and_the_simulated_engine(host: Host, reason: str) -> None:
    """The sentence names the reason, and `make up ENGINE=sim` as the way out."""
    with pytest.raises(SetupFailed) as caught:
        plan_setup(host, FROZEN)
    assert reason in caught.value.message
    assert caught.value.message.endswith(OFFER)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
        (
            "WARNING: Retrying ... NewConnectionError(...)\nERROR: No matching distribution found for x",
            "cannot be reached",
        ),
        ("ERROR: HTTP error 403 while getting x\nERROR: 403 Client Error: Forbidden for url", "refused the request"),
        ("ERROR: Ignored\nERROR: No matching distribution found for torch==2.13.0", "no build for this Python"),
        ("something\nERROR: wheel is broken", "pip failed (wheel is broken)"),
        ("", "it said nothing"),
    ],
)
def test_a_failure_of_pip_is_one_sentence(output: str, reason: str) -> None:
    """Disk, network, refusal and missing builds are told apart."""
    assert reason in explain_pip(output)
