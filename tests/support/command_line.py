"""The command line as a shell calls it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path

from .fleet import ROOT
from .processes import Child, environment

LIMIT_S = 60.0


async def inferq(folder: Path, *arguments: str, typed: str = "") -> tuple[int, str, str]:
    """Exit code, output and error output of one command, with ``typed`` as its input."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "inferq", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=_environment({}),
        cwd=folder,
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(typed.encode()), LIMIT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


def inferq_child(folder: Path, name: str, *arguments: str, env: Mapping[str, str]) -> Child:
    """One command as a process that goes on, not started yet; what it says is in its log."""
    command = [sys.executable, "-m", "inferq", *arguments]
    return Child(name, command, folder / f"{name}.log", env=_environment(env), cwd=folder)


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """Ours without settings of the machine's owner."""
    clean = environment()
    return clean | {"PYTHONPATH": str(ROOT), "COLUMNS": "120", **more}
