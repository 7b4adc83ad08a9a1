"""Workers in a Ray cluster: each a named, detached actor that keeps one ``inferq worker`` process running on its node.

``RayWorkers`` blocks, and is for the autoscaler alone; Routers, Managers and workers know nothing of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from inferq.stack.process import tethered
from queue_schemas import RAY_NAMESPACE
from telemetry.backoff import Restarts

PREFIX = "worker:"
CALL_LIMIT_S = 10.0


class WorkerActor:
    """Runs ``inferq worker`` with ``args`` until it is drained, refuses to start or keeps failing. The process is
    killed with its actor; Ray starts the actor again where another node has room for it."""

    def __init__(self, args: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command = tethered([sys.executable, "-m", "inferq", "worker", *args])
        self._environment = {**os.environ, **environment}
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._failed = ""
        self._self: Any = ray.get_runtime_context().current_actor
        # The kernel kills the process when the thread that started it ends: so this one stays.
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._thread.start()

    def state(self) -> tuple[bool, str]:
        """Whether it keeps a worker running, and why not if that failed."""
        return self._thread.is_alive(), self._failed

    def stop(self) -> None:
        """SIGTERM, which drains the worker."""
        self._stopping.set()
        process = self._process
        if process is not None:
            process.terminate()

    def _run(self) -> None:
        history = Restarts()
        while not self._stopping.is_set():
            began = time.monotonic()
            self._process = subprocess.Popen(self._command, env=self._environment, stdin=subprocess.DEVNULL)
            if self._stopping.is_set():
                self._process.terminate()
            code = self._process.wait()
            if code == 0 or self._stopping.is_set():
                ray.kill(self._self, no_restart=True)  # nobody need look again, and its resources are free
                return
            history, pause = history.ended(code, time.monotonic() - began, ready=False)
            if pause is None:
                self._failed = f"it ended with code {code} (its log: that of its actor, in the dashboard of Ray)"
                return
            self._stopping.wait(pause)


@dataclass(frozen=True, slots=True)
class Found:
    """The workers that run, and what those said that failed since the last look."""

    running: frozenset[str]
    failures: tuple[str, ...]


class RayWorkers:
    """The actors of one autoscaler's workers, whose ids begin with ``prefix``. This process is a driver of the
    cluster. Methods raise ``RayError`` and others of Ray's."""

    def __init__(self, prefix: str, *, cpus: float, gpus: float) -> None:
        self._prefix = f"{PREFIX}{prefix}-"
        self._resources = {"num_cpus": cpus, "num_gpus": gpus}

    def find(self) -> Found:
        """All that run or wait for a place. The actors of those that ended are removed."""
        running, failures = set(), []
        names = [name for name in ray.util.list_named_actors() if name.startswith(self._prefix)]
        asked = {name: actor.state.remote() for name in names if (actor := _find(name)) is not None}
        answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=1.0) if asked else ([], [])
        for name, answer in asked.items():
            try:
                runs, failed = ray.get(answer) if answer in answered else (True, "")
            except ray.exceptions.ActorDiedError:
                continue
            except ray.exceptions.ActorUnavailableError:  # it is being started again
                runs, failed = True, ""
            if runs:
                running.add(name.removeprefix(PREFIX))
            else:
                _kill(name)
                failures += [failed] if failed else []
        return Found(frozenset(running), tuple(failures))

    def start(self, worker_id: str, args: Sequence[str], environment: Mapping[str, str]) -> None:
        """Ask for a worker. Where no node has room for it, it waits for one."""
        made: Any = ray.remote(WorkerActor).options(
            name=PREFIX + worker_id,
            namespace=RAY_NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_concurrency=2,
            **self._resources,
        )
        made.remote(list(args), dict(environment))

    def stop(self, worker_id: str, *, kill: bool) -> None:
        """End a worker: with SIGTERM, or together with its actor."""
        actor = _find(PREFIX + worker_id)
        if actor is not None and kill:
            _kill(PREFIX + worker_id)
        elif actor is not None:
            ray.get(actor.stop.remote(), timeout=CALL_LIMIT_S)


def _find(name: str) -> Any | None:
    try:
        return ray.get_actor(name, RAY_NAMESPACE)
    except ValueError:
        return None


def _kill(name: str) -> None:
    actor = _find(name)
    if actor is not None:
        ray.kill(actor, no_restart=True)
