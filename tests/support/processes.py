"""Child processes of tests: each in a session of its own, with a log, gone when the tests are gone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import httpx

from .death_signal import die_with_parent
from .preloaded import ForkedProcess, can_fork, fork


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without settings of inferq, and with ``variables``."""
    return {name: value for name, value in os.environ.items() if not name.startswith("INFERQ_")} | variables


def is_alive(pid: int) -> bool:
    """Whether a process has not ended; one whose end nobody has asked for has ended all the same."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except (FileNotFoundError, ProcessLookupError):
        return False


def answers(url: str) -> bool:
    """Whether a GET of ``url`` gets status 200."""
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def role_starter(module: str, folder: Path) -> Iterator[Callable[..., Child]]:
    """A function ``start(*flags, **variables)`` that runs ``python -m module`` in ``folder``; ends with the block."""
    children: list[Child] = []

    def start(*flags: str, **variables: str) -> Child:
        name = module.partition(".")[0]
        args = [sys.executable, "-m", module, "--log-format", "json", *flags]
        log = folder / f"{name}-{len(children)}.log"
        children.append(Child(name, args, log, env=environment(**variables), cwd=folder))
        children[-1].start()
        return children[-1]

    try:
        yield start
    finally:
        for child in children:
            child.kill_group()


class Child:
    """One process: ``start``, ``terminate``, ``kill``, ``pause``, ``resume``; after an end it may be started again.

    With ``preloaded``, a role of ours is forked from a process that has its modules where that changes nothing else.
    """

    def __init__(
        self,
        name: str,
        args: Sequence[str],
        log_path: Path,
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        preloaded: bool = False,
    ) -> None:
        self.name = name
        self.args = [str(arg) for arg in args]
        self.log_path = log_path
        self._env = dict(env) if env is not None else None
        self._cwd = cwd
        self._preloaded = preloaded
        self._process: subprocess.Popen[bytes] | ForkedProcess | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code; None while it runs."""
        assert self._process is not None, f"{self.name} was not started"
        return self._process.poll()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process, its output appended to the log."""
        assert not self.running, f"{self.name} runs already"
        env = dict(os.environ if self._env is None else self._env)
        if self._preloaded and can_fork(self.args, env):
            self._process = fork(self.args, env, self._cwd or Path.cwd(), self.log_path)
            return
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.args,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=self._cwd,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one prctl call: safe enough for tests
            )

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process alone, not to its children."""
        os.kill(self.pid, number)

    def pause(self) -> None:
        """Stop scheduling it: alive, but silent."""
        self.send(signal.SIGSTOP)

    def resume(self) -> None:
        """End a :meth:`pause`."""
        self.send(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        if self.running:
            self.send(signal.SIGKILL)
            self.wait(10)

    def kill_group(self) -> None:
        """SIGKILL for it and everything it started in its session."""
        if self._process is not None:
            for kill in (os.killpg, os.kill):  # one that was just forked has no session yet
                with contextlib.suppress(ProcessLookupError):
                    kill(self._process.pid, signal.SIGKILL)
            self._process.wait(10)

    def terminate(self, limit_s: float = 15.0) -> int:
        """SIGTERM, and its exit code; fails with the log's tail if it does not end within ``limit_s``."""
        if self.running:
            self.send(signal.SIGTERM)
        return self.wait(limit_s)

    def wait(self, limit_s: float) -> int:
        """Its exit code, waiting up to ``limit_s``."""
        assert self._process is not None
        try:
            return self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {limit_s:g} s\n{self.log_tail()}") from None

    def log_text(self) -> str:
        """Everything it has said."""
        return self.log_path.read_text("utf-8", "replace") if self.log_path.exists() else ""

    def log_tail(self, lines: int = 40) -> str:
        """The end of its log, under its name."""
        tail = "\n".join(self.log_text().splitlines()[-lines:])
        return f"--- {self.name} ({' '.join(self.args[:6])} ...)\n{tail}"

    def until(self, ready: Callable[[], bool], limit_s: float) -> None:
        """Wait until ``ready()`` answers true; fails with the log's tail if it ends or takes too long."""
        limit = time.monotonic() + limit_s
        while not ready():
            if not self.running:
                raise AssertionError(f"{self.name} ended with code {self.returncode}\n{self.log_tail()}")
            if time.monotonic() > limit:
                raise AssertionError(f"{self.name} was not ready within {limit_s:g} s\n{self.log_tail()}")
            time.sleep(0.005)
