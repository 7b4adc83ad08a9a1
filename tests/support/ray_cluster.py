"""The fabric in a real Ray cluster of its own: a head with free ports and a token, below one temporary folder.

Everything goes through the `inferq` command, in processes of their own: Ray reads its variables when it is loaded, and
the tests' process stays free of it::

    cluster = RayCluster(folder, server)
    cluster.up()
    cluster.url        # the way in, for workers and clients
    cluster.down()     # whatever has happened
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inferq.ray_cluster.head import driver_environment, read_head
from telemetry.environment import HeldPorts, free_port

from .servers import Server

ROOT = Path(__file__).parents[2]
UP_LIMIT_S, ASK_LIMIT_S = 180.0, 60.0
_MANAGER = {
    "LEASE_MS": 3_000,
    "HEARTBEAT_INTERVAL_MS": 300,
    "UNRESPONSIVE_AFTER_MS": 1_000,
    "LEADER_LEASE_MS": 1_500,
    "SWEEP_INTERVAL_MS": 200,
}
_ROUTER = {"DIRECTORY_INTERVAL_MS": 100, "SWEEP_INTERVAL_MS": 50, "DEADLINE_GRACE_MS": 1_000}
"""The same short times as in :mod:`tests.support.fleet`."""

_DRIVER = """
import json, logging, sys, ray
ray.init(address=sys.argv[1], namespace="inferq", log_to_driver=False, logging_level=logging.ERROR)
"""


class RayCluster:
    """One cluster with the fabric in it. ``env`` adds to the environment of its processes, or takes from it (None)."""

    def __init__(self, folder: Path, server: Server, *, env: Mapping[str, str | None] | None = None) -> None:
        self.folder = folder
        self.server = server
        self._ports = HeldPorts()  # they are used long after, when many connections have come and gone
        self.port = self._ports.take()
        self.dashboard_port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.data_dir = folder / "data"
        self._session = Path(tempfile.mkdtemp(prefix="iqray-"))  # short, for unix sockets
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("INFERQ_", "RAY_"))}
        clean |= {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "INFERQ_RAY_SESSION_DIR": str(self._session)}
        clean |= {"TMPDIR": str(self._session)}  # where Routers hand each other their socket
        clean |= fabric_variables(server)
        changes = env or {}
        self.env = {name: value for name, value in {**clean, **changes}.items() if value is not None}

    def inferq(
        self, *arguments: str, env: Mapping[str, str] | None = None, limit_s: float = UP_LIMIT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run one `inferq` command with this cluster's environment (or ``env``) and data folder; its output as text."""
        return subprocess.run(
            [sys.executable, "-m", "inferq", *arguments],
            env={**(env or self.env), "INFERQ_DATA_DIR": str(self.data_dir)},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )

    def up(self, *flags: str) -> dict[str, Any]:
        """`inferq ray up`, which must go well; what it says of the fabric."""
        ports = ("--port", str(self.port), "--dashboard-port", str(self.dashboard_port))
        done = self.inferq("ray", "up", *ports, "--json", *flags)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{self.logs()}"
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    def status(self) -> dict[str, Any]:
        """`inferq ray status`, whatever its exit code."""
        done = self.inferq("ray", "status", "--json", limit_s=ASK_LIMIT_S)
        assert done.stdout, done.stderr
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    @property
    def dashboard_url(self) -> str:
        """Where Serve's own command reaches the cluster."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def address(self) -> str:
        """The head's address."""
        head = read_head(self.data_dir)
        assert head is not None, "the cluster does not run"
        return head.address

    @property
    def driver_env(self) -> dict[str, str]:
        """The environment of a process that is to be let into the cluster."""
        head = read_head(self.data_dir)
        assert head is not None, "the cluster does not run"
        return {**self.env, **driver_environment(head.token_file, loopback=head.loopback)}

    def ask(self, code: str, *, limit_s: float = ASK_LIMIT_S) -> Any:
        """Run Python ``code`` as a driver of the cluster, ``ray`` loaded; what it leaves in ``answer``, as JSON."""
        done = subprocess.run(
            [sys.executable, "-c", f"{_DRIVER}\nanswer = None\n{code}\nprint(json.dumps(answer))", self.address],
            env=self.driver_env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def replicas(self) -> list[int]:
        """The process ids of the Router's replicas."""
        return self.processes("ray::ServeReplica")

    def dashboard_log(self) -> str:
        """What Ray's dashboard has written, its usage statistics included."""
        return "".join(
            file.read_text("utf-8", "replace") for file in self._session.glob("session_latest/logs/dashboard*.log")
        )

    def variables(self, name: str) -> set[str]:
        """The values that an environment variable has in the cluster's processes; empty where one has none."""
        found = set[str]()
        head = read_head(self.data_dir)
        for pid in head.processes() if head is not None else ():
            with contextlib.suppress(OSError):
                given = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                values = [entry.partition(b"=")[2].decode() for entry in given if entry.startswith(f"{name}=".encode())]
                found.add(values[0] if values else "")
        return found

    def processes(self, title: str = "") -> list[int]:
        """The process ids of the cluster whose title begins so."""
        head = read_head(self.data_dir)
        return [pid for pid in head.processes() if _title(pid).startswith(title)] if head is not None else []

    def down(self) -> None:
        """End every process of the cluster, drained or not, and remove its folders."""
        head = read_head(self.data_dir)
        if head is not None:
            for pid in head.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            limit = time.monotonic() + 10
            while head.processes() and time.monotonic() < limit:
                time.sleep(0.05)
            assert not head.processes(), "processes of the cluster are left"
        shutil.rmtree(self._session, ignore_errors=True)
        self._ports.close()

    def output(self) -> str:
        """All that Manager, replicas and Serve's controller have written."""
        files = self._session.glob("session_latest/logs/worker-*.err")
        return "".join(file.read_text("utf-8", "replace") for file in files)

    def logs(self) -> str:
        """The last words of Manager, replicas and Serve's controller."""
        files = [*self._session.glob("session_latest/logs/worker-*.err"), *self.data_dir.glob("logs/*.log")]
        files += self._session.glob("session_latest/logs/serve/*.log")
        tails = [
            f"--- {file.name}\n" + "\n".join(file.read_text("utf-8", "replace").splitlines()[-15:]) for file in files
        ]
        return "\n".join(tail for tail in tails if tail.count("\n"))


def fabric_variables(server: Server) -> dict[str, str]:
    """Settings of a fabric in Ray with short times, on the queue of ``server``."""
    variables = {f"INFERQ_MANAGER_{name}": str(value) for name, value in _MANAGER.items()}
    variables |= {f"INFERQ_ROUTER_{name}": str(value) for name, value in _ROUTER.items()}
    variables |= {"RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1"}  # every 10 s otherwise
    return variables | {"INFERQ_RAY_LAME_DUCK_MS": "1500", "INFERQ_REDIS_URL": server.url}


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return ""
