"""The example workers, each beside an engine of its own, as processes of a fleet."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import pytest

from .processes import Child, environment
from .waiting import eventually

ROOT = Path(__file__).parents[2]
WORKERS = ROOT / "examples" / "workers"
BUILD_LIMIT_S = 110.0


def program(name: str, package: str) -> str:
    """Where a program is; the test is skipped where it is not installed."""
    return shutil.which(name) or pytest.skip(f"{name} is not installed (apt-get install {package})")


def build_go_worker(folder: Path) -> Path:
    """The example in Go, built into ``folder``."""
    go = program("go", "golang-go")
    built = folder / "go-worker"
    env = environment(GO111MODULE="off", GOFLAGS="", GOCACHE=str(Path.home() / ".cache" / "go-build"))
    subprocess.run(
        [go, "build", "-o", str(built), "worker.go"], cwd=WORKERS, env=env, check=True, timeout=BUILD_LIMIT_S
    )
    return built


def example_command(language: str, folder: Path) -> list[str]:
    """What starts the example worker in ``python``, ``node`` or ``go``."""
    if language == "go":
        return [str(build_go_worker(folder))]
    if language == "node":
        return [program("node", "nodejs"), str(WORKERS / "worker.mjs")]
    return [sys.executable, str(WORKERS / "worker.py")]


class ExampleWorker:
    """A worker of another make, and its engine, which is started again whenever it ends."""

    def __init__(
        self, folder: Path, name: str, command: Sequence[str], engine: Sequence[object], env: Mapping[str, str]
    ) -> None:
        """``engine``: the simulated engine's options; ``env``: what the worker is told."""
        self.name = name
        options = " ".join(map(str, engine))
        loop = f"while true; do {sys.executable} -m worker.engines.simulated {options}; sleep 0.5; done"
        clean = environment() | {"PYTHONPATH": str(ROOT)}
        self.engine = Child(f"{name}-engine", ["sh", "-c", loop], folder / f"{name}-engine.log", env=clean, cwd=folder)
        self.process = Child(name, command, folder / f"{name}.log", env=environment() | dict(env), cwd=folder)

    async def ready(self, page: str = "") -> Self:
        """It has no page of its own; who needs it asks the Router."""
        return self

    async def ended(self, limit_s: float = 20.0) -> int:
        """Its exit code, waited for without blocking the loop."""
        await eventually(lambda: not self.process.running, f"{self.name} ends", limit_s=limit_s)
        code = self.process.returncode
        assert code is not None
        return code

    def kill(self) -> None:
        """End both."""
        self.process.kill_group()
        self.engine.kill_group()
