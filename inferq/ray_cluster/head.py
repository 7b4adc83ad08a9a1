"""The head of a Ray cluster of our own: one daemon on this machine, found again by its record in the data folder.

Knows Ray's command line only. The head and all that it starts share one session, whose number is the head's process
id: so they can be told from everything else, also after the head's own end.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from inferq.processes import boot_id, send, session_members, start_of, until
from queue_schemas import CannotStart
from telemetry.environment import free_port
from telemetry.files import open_log, write_private
from telemetry.http.server import bind_socket

from .settings import RaySettings
from .usage import direct_environment, usage_environment

LOOPBACK = "127.0.0.1"
STOP_LIMIT_S, KILL_LIMIT_S = 15.0, 10.0
LOCK_LIMIT_S = 5.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Head:
    """The record. ``started`` (clock ticks since boot) and ``boot`` tell a process from a later one of its id."""

    pid: int
    started: int
    boot: str
    address: str
    """Empty until it has started."""
    dashboard_url: str
    token_file: str
    loopback: bool
    """Whether no other machine can reach it."""

    @property
    def runs(self) -> bool:
        return self.boot == boot_id() and start_of(self.pid) == self.started

    def processes(self) -> list[int]:
        """The ids of the head and of all that it has started and that still runs."""
        if self.boot != boot_id() or start_of(self.pid) not in {None, self.started}:
            return []  # the id is another's by now, which it could not be with one of its session left
        return session_members(self.pid, self.started)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One command at a time works on ``folder``. Raises ``CannotStart`` if another one goes on doing so."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "ray.lock").open("w")
    except OSError as error:
        raise CannotStart(f"the data folder {folder} cannot be used: {error.strerror}") from error
    with file:
        limit = time.monotonic() + LOCK_LIMIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > limit:
                    raise CannotStart(f"another `inferq ray` works on {folder}: wait for its end") from error
            time.sleep(_POLL_S)
        yield


def read_head(folder: Path) -> Head | None:
    """The head that the record in ``folder`` tells of, whether it runs or not."""
    try:
        return Head(**json.loads(_record(folder).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise CannotStart(
            f"{_record(folder)} cannot be read ({error}): look with `ps` for a `ray start --head`, end it, "
            "and remove that file"
        ) from error


def running_head(folder: Path) -> Head | None:
    """The head of ``folder``, if it runs and has come up."""
    head = read_head(folder)
    return head if head is not None and head.runs and head.address else None


def start_head(settings: RaySettings) -> Head:
    """Start a head and return once it has come up. Raises ``CannotStart`` with what keeps it from it."""
    folder, session = settings.data_folder, settings.session_folder
    left = read_head(folder)
    if left is not None:
        stop_head(left, folder)  # one that was killed, or that somebody stopped waiting for
    host = settings.node_host or LOOPBACK
    dashboard_port = settings.dashboard_port or free_port(LOOPBACK)
    bind_socket(LOOPBACK, dashboard_port, setting="--dashboard-port").close()
    if settings.head_port:
        bind_socket(host, settings.head_port, setting="--head-port").close()
    _prepare_session(session)
    log_path = folder / "logs" / "ray-head.log"
    token = _ensure_token(folder)
    with open_log(log_path) as log:
        since = log.tell()
        process = subprocess.Popen(
            head_command(settings, dashboard_port, free_port(LOOPBACK)),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=head_environment(token, loopback=not settings.node_host) | direct_environment(host),
            start_new_session=True,
        )
    head = Head(
        pid=process.pid,
        started=start_of(process.pid) or 0,
        boot=boot_id(),
        address="",
        dashboard_url=f"http://{LOOPBACK}:{dashboard_port}",
        token_file=str(token),
        loopback=not settings.node_host,
    )
    _write(folder, head)
    try:
        address = _await_address(process, session, settings.start_limit_ms / 1000, log_path, since)
        head = Head(**{**asdict(head), "address": address})
        _write(folder, head)
    except BaseException:
        stop_head(head, folder)
        process.wait(KILL_LIMIT_S)
        raise
    return head


def stop_head(head: Head, folder: Path) -> None:
    """End the head and everything it started; harmless where nothing is left. Removes the record."""
    if head.runs:
        send(head.pid, signal.SIGTERM)
        until(lambda: not head.runs, STOP_LIMIT_S)
    if not until(lambda: not head.processes(), STOP_LIMIT_S if not head.runs else 0):
        for pid in head.processes():
            send(pid, signal.SIGKILL)
        if not until(lambda: not head.processes(), KILL_LIMIT_S):
            left = ", ".join(map(str, head.processes()))
            raise CannotStart(f"the Ray processes {left} cannot be ended: look at what the kernel waits for in them")
    _record(folder).unlink(missing_ok=True)


def head_command(settings: RaySettings, dashboard_port: int, client_port: int) -> list[str]:
    """How a head is started."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    if settings.node_host:
        command += ["--node-ip-address", settings.node_host]
    for flag, value in (
        ("--port", settings.head_port),
        ("--dashboard-host", LOOPBACK),
        ("--dashboard-port", dashboard_port),
        ("--dashboard-agent-listen-port", 0),
        # Cannot be left out; it wants the token like the rest.
        ("--ray-client-server-port", client_port),
        # Any that is free: Ray's own range (10002 to 19999) holds the ports of Routers.
        ("--min-worker-port", 0),
        ("--max-worker-port", 0),
        ("--object-store-memory", settings.object_store_mib << 20),
        ("--temp-dir", settings.session_folder),
    ):
        command += [flag, str(value)]
    return command


def head_environment(token: Path, *, loopback: bool) -> dict[str, str]:
    """The environment of a head, which all that it starts inherit."""
    return {
        **os.environ,
        **driver_environment(str(token), loopback=loopback),
        # The fabric is drained before the head is told to end.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }


def driver_environment(token_file: str, *, loopback: bool) -> Mapping[str, str]:
    """What a process needs to be let into our own cluster, and to be as silent as it is."""
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token_file, **usage_environment()}
    if loopback:
        # Ray's word for a cluster of one machine. Without it Ray listens on all addresses of this one, even when told
        # --node-ip-address 127.0.0.1, which it replaces.
        variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return variables


def _await_address(process: subprocess.Popen[bytes], session: Path, limit_s: float, log_path: Path, since: int) -> str:
    """The head's address, once it has written it down, which it does when everything runs."""
    limit = time.monotonic() + limit_s
    file = session / "ray_current_cluster"
    while True:
        if process.poll() is not None:
            words = _last_words(log_path, since)
            raise CannotStart(f"Ray's head ended with code {process.returncode}: {words} (its log: {log_path})")
        with contextlib.suppress(FileNotFoundError):
            if address := file.read_text().strip():
                return address
        if time.monotonic() > limit:
            raise CannotStart(f"Ray's head was not up within {limit_s:.0f} s; its log: {log_path}")
        time.sleep(_POLL_S)


def _prepare_session(session: Path) -> None:
    """A folder of ours alone, with no more in it than the logs of last time."""
    try:
        session.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CannotStart(f"Ray's folder {session} cannot be made: {error.strerror}; name another one") from error
    if session.stat().st_uid != os.getuid():
        raise CannotStart(f"{session} belongs to another user: name another folder (INFERQ_RAY_SESSION_DIR)")
    (session / "ray_current_cluster").unlink(missing_ok=True)
    for old in sorted(session.glob("session_2*"))[:-1]:
        shutil.rmtree(old, ignore_errors=True)


def _ensure_token(folder: Path) -> Path:
    """The file of the secret that the cluster's processes show each other, made if there is none."""
    file = folder / "ray-token"
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists() or not file.read_text().strip():
        write_private(file, secrets.token_hex(32))
    return file


def _write(folder: Path, head: Head) -> None:
    write_private(_record(folder), json.dumps(asdict(head), indent=2) + "\n")


def _record(folder: Path) -> Path:
    return folder / "ray.json"


def _last_words(log_path: Path, since: int) -> str:
    with log_path.open("rb") as file:
        file.seek(since)
        lines = file.read(65_536).decode("utf-8", "replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
