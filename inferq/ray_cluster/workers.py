"""Workers in a Ray cluster: each a named, detached actor that keeps one ``inferq worker`` process running on its node.

``RayWorkers`` blocks, and is for the autoscaler alone; Routers, Managers and workers know nothing of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import ray

from inferq.stack.logs import readable_error
from inferq.stack.process import tethered
from queue_schemas import RAY_NAMESPACE
from queue_schemas.addresses import is_loopback
from telemetry.backoff import Restarts

from .actors import actor_names, find_actor

PREFIX = "worker:"
CALL_LIMIT_S = 10.0
FIND_LIMIT_S = 1.0
_LAST_WORDS_S = 1.0
_MAX_WORDS = 300


class WorkerActor:
    """Runs ``inferq worker`` with ``args`` until it is drained, refuses to start or keeps failing. The process is
    killed with its actor; Ray starts the actor again where another node has room for it."""

    def __init__(self, args: Sequence[str], environment: Mapping[str, str]) -> None:
        self._environment = {**os.environ, **environment}
        address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        listening = listening_args(args, address, self._environment)
        self._command = tethered([sys.executable, "-m", "inferq", "worker", *args, *listening])
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
        """SIGTERM, which drains the worker. The actor ends with it, or at once if none runs."""
        self._stopping.set()
        process = self._process
        if not self._thread.is_alive():
            ray.kill(self._self, no_restart=True)
        elif process is not None:
            process.terminate()

    def _run(self) -> None:
        history = Restarts()
        while not self._stopping.is_set():
            began = time.monotonic()
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            words = LastWords(self._process.stderr)
            if self._stopping.is_set():
                self._process.terminate()
            code = self._process.wait()
            if code == 0 or self._stopping.is_set():
                ray.kill(self._self, no_restart=True)  # nobody need look again, and its resources are free
                return
            history, pause = history.ended(code, time.monotonic() - began, ready=False)
            if pause is None:
                self._failed = words.read() or f"it ended with code {code}, and said nothing"
                return
            self._stopping.wait(pause)


class LastWords:
    """Passes a worker's standard error on to this process's, and remembers the last line with which it ended."""

    def __init__(self, stream: IO[bytes] | None) -> None:
        self._words = ""
        self._thread = threading.Thread(target=self._pass_on, args=(stream,), name="stderr", daemon=True)
        self._thread.start()

    def read(self) -> str:
        """The line, once the stream has ended. An engine that outlives its worker may keep it open: for
        ``_LAST_WORDS_S`` at most."""
        self._thread.join(_LAST_WORDS_S)
        return self._words

    def _pass_on(self, stream: IO[bytes]) -> None:
        for line in stream:
            text = line.decode("utf-8", "replace").rstrip()
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
            if not text.startswith("{"):
                self._words = (readable_error(text) or self._words).removeprefix("inferq: ")[:_MAX_WORDS]


def listening_args(args: Sequence[str], address: str, environment: Mapping[str, str]) -> list[str]:
    """Options by which the Manager reaches a worker on a node with this address, and finds out at once when it is
    killed. Without a join token, whose holders alone may call it, a worker stays on loopback."""
    chosen = any(part.split("=")[0] == "--host" for part in args)
    return [] if chosen or is_loopback(address) or not environment.get("INFERQ_JOIN_TOKEN") else ["--host", address]


@dataclass(frozen=True, slots=True)
class Found:
    """The workers that run, and what those said that failed since the last look."""

    running: frozenset[str]
    failures: tuple[str, ...]


class RayWorkers:
    """The actors of one autoscaler's workers, whose ids begin with ``prefix``. This process is one of the cluster's.
    Methods raise ``RayError`` and others of Ray's."""

    def __init__(self, prefix: str, *, cpus: float, gpus: float) -> None:
        self._prefix = f"{prefix}-"
        self._resources = {"num_cpus": cpus, "num_gpus": gpus}

    def find(self) -> Found:
        """All that run or wait for a place. The actors of those that ended are removed."""
        running, failures = set(), []
        actors = {worker_id: actor for worker_id, actor in worker_actors() if worker_id.startswith(self._prefix)}
        asked = {worker_id: actor.state.remote() for worker_id, actor in actors.items()}
        answered, _ = ray.wait([*asked.values()], num_returns=len(asked), timeout=FIND_LIMIT_S) if asked else ([], [])
        for worker_id, answer in asked.items():
            try:
                runs, failed = ray.get(answer) if answer in answered else (True, "")
            except ray.exceptions.ActorDiedError:
                continue
            except ray.exceptions.ActorUnavailableError:  # it is being started again
                runs, failed = True, ""
            if runs:
                running.add(worker_id)
            else:
                ray.kill(actors[worker_id], no_restart=True)
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
        actor = find_actor(PREFIX + worker_id)
        if actor is not None and kill:
            ray.kill(actor, no_restart=True)
        elif actor is not None:
            ray.get(actor.stop.remote(), timeout=CALL_LIMIT_S)


def worker_actors() -> Iterator[tuple[str, Any]]:
    """The id and actor of every worker that runs in the cluster or waits for a place."""
    for name in actor_names(PREFIX):
        actor = find_actor(name)
        if actor is not None:
            yield name.removeprefix(PREFIX), actor
