"""What to install for a machine, or why not: a pure decision about facts that :mod:`.environment` gathered."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum

from queue_schemas import CannotStart

VLLM_VERSION = "0.32.0"
OFFER = "Without it: `make up ENGINE=sim` (or `inferq up --engine sim`) serves with the simulated engine, in seconds."
_GIB = 1 << 30
_UNREACHABLE = (
    "connection refused",
    "connecttimeout",
    "failed to establish a new connection",
    "max retries exceeded",
    "name or service not known",
    "network is unreachable",
    "newconnectionerror",
    "proxyerror",
    "read timed out",
    "temporary failure in name resolution",
)
_REFUSED = ("401 client error", "403 client error", "407 client error", "error 401", "error 403", "forbidden")


class SetupFailed(CannotStart):
    """vLLM or its model cannot be set up here; the message says why and offers the simulated engine."""

    code = "setup_failed"

    def __init__(self, reason: str) -> None:
        super().__init__(f"vLLM cannot be set up here: {reason}\n{OFFER}")


class Kind(StrEnum):
    """Which build of vLLM."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True)
class Host:
    """Facts about a machine; ``system`` and ``machine`` as ``platform`` names them, ``python`` is (major, minor)."""

    system: str
    machine: str
    python: tuple[int, int]
    nvidia_gpu: bool
    free_disk_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How the environment comes to be: ``requirements`` go to pip, after the frozen set without its dependencies."""

    kind: Kind
    frozen: str
    requirements: tuple[str, ...]
    key: str
    """Names the environment's folder: another plan is another folder."""
    packages: int
    """How many packages pip is about to collect, for the progress shown; 0 if not known before."""
    sentence: str


def plan_setup(host: Host, frozen: str) -> Plan:
    """The plan for ``host``; ``frozen`` is the text of the shipped CPU set. Raises :class:`SetupFailed`."""
    if host.system != "Linux":
        raise SetupFailed(f"it runs on Linux, and this is {host.system}.")
    if host.machine not in {"x86_64", "aarch64"}:
        raise SetupFailed(f"there is no build of it for {host.machine}, only for x86_64 and aarch64.")
    if not (3, 11) <= host.python <= (3, 13):
        raise SetupFailed(f"it needs Python 3.11 to 3.13, and this is {host.python[0]}.{host.python[1]}.")
    kind = Kind.CUDA if host.nvidia_gpu else Kind.CPU
    requirements: tuple[str, ...]
    needed = (20 if kind is Kind.CUDA else 8) * _GIB
    if host.free_disk_bytes < needed:
        raise SetupFailed(
            f"it needs {needed // _GIB} GiB of free disk, and {host.free_disk_bytes / _GIB:.1f} GiB are free in the "
            "cache folder: free some, or name another folder with INFERQ_CACHE_DIR."
        )
    if kind is Kind.CUDA:
        # gguf and accelerate make the default model; vLLM itself brings everything else in the versions it wants.
        requirements, chosen = (f"vllm=={VLLM_VERSION}", "gguf", "accelerate"), ""
        packages, sentence = 0, f"vLLM {VLLM_VERSION} for the NVIDIA GPU (several GB, once)"
    else:
        requirements, chosen = (), frozen
        packages = sum(1 for line in frozen.splitlines() if "==" in line)
        sentence = f"vLLM {VLLM_VERSION} for the CPU, as no NVIDIA GPU was found (2.5 to 5.5 GB, some minutes, once)"
    basis = "\n".join((kind, host.machine, f"{host.python}", *requirements, chosen))
    digest = hashlib.sha256(basis.encode()).hexdigest()[:12]
    return Plan(kind, chosen, requirements, f"vllm-{VLLM_VERSION}-{kind}-{digest}", packages, sentence)


def explain_pip(output: str) -> str:
    """A sentence on why pip failed, from what it printed."""
    lowered = output.lower()
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR")]
    last = (errors or lines or ["it said nothing"])[-1]
    if "no space left on device" in lowered or "disk quota exceeded" in lowered:
        return "the disk is full: free some space, or name another folder with INFERQ_CACHE_DIR."
    if any(sign in lowered for sign in _UNREACHABLE):
        return "the package registry cannot be reached: check the network and pip's settings."
    if any(sign in lowered for sign in _REFUSED):
        return f"the package registry refused the request ({last})."
    if "no matching distribution" in lowered or "could not find a version" in lowered:
        missing = next((line for line in reversed(errors) if "No matching distribution" in line), last)
        return f"the package registry has no build for this Python and machine ({missing})."
    return f"pip failed ({last})."
