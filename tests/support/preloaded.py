"""Roles that start quickly: forked from a process that has imported what they need.

A role spends nearly all of its start on imports, and the tests start thousands. Here they are done once for a run of
tests; each role is still a process of its own, with its own session, environment, folder and log, and dies as one by
any signal. Tests of how a role starts run ``python -m`` as users do.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from .death_signal import die_with_parent

ROLES = ("manager.service", "router.service", "worker.service", "batches.service", "webhooks.service")
"""Modules with a ``main`` that answers the exit code."""

USED_LATER = (
    *("broker.embedded.server", "worker.engines.simulated.server", "uvloop", "uvicorn.lifespan.off", "pydantic.v1"),
    *("encodings.idna", "fsspec.implementations.chained"),
)
"""Modules that a role imports only once it runs."""

_ROOT = Path(__file__).parents[2]
_OF_THE_INTERPRETER = ("LD_", "PYTHON", "GLIBC_", "MALLOC_")
"""How variables begin that only a start reads: with others than ours, a role needs a start of its own."""

_PRELOADING = "INFERQ_TESTS_PRELOADING"


def can_fork(args: Sequence[str], env: Mapping[str, str]) -> bool:
    """Whether a command may be forked instead: ``python -m`` a role, with nothing that changes the interpreter."""
    if sys.platform != "linux" or tuple(args[:2]) != (sys.executable, "-m") or args[2] not in ROLES:
        return False
    return _of_the_interpreter(env) <= _of_the_interpreter(os.environ) | {("PYTHONPATH", str(_ROOT))}


def _of_the_interpreter(env: Mapping[str, str]) -> set[tuple[str, str]]:
    return {(name, value) for name, value in env.items() if name.startswith(_OF_THE_INTERPRETER)}


class ForkedProcess:
    """What :class:`subprocess.Popen` offers of a process that was forked by :func:`fork`."""

    def __init__(self, process: ForkServerProcess) -> None:
        assert process.pid is not None
        self.pid = process.pid
        self._process = process

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; raises ``TimeoutExpired`` after so many seconds."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code


def fork(args: Sequence[str], env: Mapping[str, str], folder: Path, log: Path) -> ForkedProcess:
    """Start a role as ``python -m`` would, in ``folder``, its output appended to ``log``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    before = os.environ.get("PYTHONPATH")
    os.environ |= {"PYTHONPATH": str(_ROOT), _PRELOADING: "1"}
    try:
        forkserver.ensure_running()
    finally:
        del os.environ[_PRELOADING]
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    process = context.Process(
        target=_become, args=(args[2], list(args[3:]), dict(env), str(folder), str(log)), daemon=True
    )
    process.start()
    return ForkedProcess(process)


def _become(module: str, flags: list[str], env: dict[str, str], folder: str, log: str) -> None:
    """Be the role, in a process that was just forked."""
    os.setsid()
    die_with_parent()
    nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for number, opened in enumerate((nothing, output, output)):
        os.dup2(opened, number)
    # Among the others is what keeps the parent alive while any of its children lives.
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    role = importlib.import_module(module)
    sys.argv = [str(role.__file__), *flags]
    sys.exit(role.main())


if os.environ.pop(_PRELOADING, ""):  # in the process that forks
    for _name in (*ROLES, *USED_LATER):
        importlib.import_module(_name)
    importlib.import_module("broker.redis.scripts").load_scripts(flags=True)
    gc.collect()
    gc.freeze()  # or each role's collector would copy every page
