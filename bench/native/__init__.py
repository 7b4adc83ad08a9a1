"""The fake engine and the load generator, in C so that neither is the bottleneck: compiled on first use."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).parent
BUILD_FOLDER = _HERE.parents[1] / ".inferq" / "bench"
_FLAGS = ("-O2", "-Wall", "-Wextra")


class CannotCompile(Exception):
    """There is no C compiler, or it fails; the message says what to do."""


def engine() -> Path:
    """The fake engine (``engine.c``)."""
    return _program("engine")


def load_generator() -> Path:
    """The load generator (``load.c``)."""
    return _program("load")


def _program(name: str) -> Path:
    """The program of ``name``.c, compiled unless that was done before from the same source."""
    sources = [_HERE / "common.h", _HERE / f"{name}.c"]
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    program = BUILD_FOLDER / f"{name}-{digest}"
    if program.exists():
        return program
    if not sys.platform.startswith("linux"):
        raise CannotCompile("The benchmark needs Linux: its engine and load generator use epoll, its figures /proc.")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise CannotCompile(
            "The benchmark compiles its engine and load generator, and there is no C compiler (cc, gcc, clang). "
            "Install one with its headers: apt-get install gcc libc6-dev, dnf install gcc glibc-devel or "
            "apk add gcc musl-dev."
        )
    BUILD_FOLDER.mkdir(parents=True, exist_ok=True)
    unfinished = program.with_suffix(f".{os.getpid()}")
    done = subprocess.run(
        [compiler, *_FLAGS, "-o", unfinished, sources[1]], capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode != 0:
        raise CannotCompile(f"{compiler} does not compile {sources[1]} (are C headers installed?):\n{done.stderr}")
    return unfinished.rename(program)
