"""A Ray cluster of several nodes on this machine, which `inferq ray --address` joins.

All nodes share one network: the Routers of all share one listening socket, as those of one machine do. The nodes are
run by this module as a program, so that the tests' process stays free of Ray::

    with RayNodes(folder, server, [{"num_cpus": 2}, {"num_cpus": 2, "num_gpus": 1}]) as nodes:
        nodes.inferq("up", "--model", "sim", ...)
        nodes.remove(1)

The program's arguments are the nodes' resources in JSON, the head's first. It prints the head's address, then obeys
lines on its standard input, ``remove N`` and ``add RESOURCES``, and answers each with a line.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from inferq.processes import session_members, start_of
from inferq.ray_cluster.head import driver_environment
from inferq.ray_cluster.usage import direct_environment
from telemetry.environment import HeldPorts
from telemetry.files import write_private

from .processes import environment
from .ray_cluster import ROOT, UP_LIMIT_S, fabric_variables
from .servers import Server

END_LIMIT_S = 60.0
_STORE_BYTES = 80 << 20
_FIND_DEAD_NODES_FAST = {"RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "1000"}
_FIND_DEAD_NODES_FAST |= {"RAY_health_check_failure_threshold": "3", "RAY_health_check_initial_delay_ms": "0"}
Resources = Mapping[str, float]


class RayNodes:
    """The nodes, and `inferq ray` on them. ``env`` is that of all their processes and of the commands."""

    def __init__(self, folder: Path, server: Server, nodes: Sequence[Resources], **variables: str) -> None:
        self.folder = folder
        self.count = len(nodes)
        self._nodes = nodes
        self._ports = HeldPorts()
        self.port = self._ports.take()
        self.url = f"http://127.0.0.1:{self.port}"
        self._session = Path(tempfile.mkdtemp(prefix="iqray-"))  # short, for unix sockets
        token = folder / "token"
        write_private(token, "of these nodes alone")
        clean = {name: value for name, value in environment().items() if not name.startswith("RAY_")}
        clean |= {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "TMPDIR": str(self._session)}
        clean |= {"RAY_TMPDIR": str(self._session), **_FIND_DEAD_NODES_FAST}
        clean |= {**driver_environment(str(token), loopback=True), **direct_environment("127.0.0.1")}
        self.env = clean | fabric_variables(server) | variables

    def __enter__(self) -> Self:
        with (self.folder / "nodes.log").open("w") as log:
            self._program = subprocess.Popen(
                [sys.executable, "-m", __spec__.name, *map(json.dumps, self._nodes)],
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._since = start_of(self._program.pid) or 0
        try:
            self.address = self._answer()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._program.stdin is not None
        self._program.stdin.close()
        try:
            self._program.wait(END_LIMIT_S)
        finally:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(self._session, ignore_errors=True)
            self._ports.close()

    def inferq(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `inferq ray COMMAND` on the cluster; its output as text."""
        return subprocess.run(
            [sys.executable, "-m", "inferq", "ray", command, "--address", self.address, *arguments],
            env=self.env,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=UP_LIMIT_S,
            check=False,
        )

    def up(self, *arguments: str) -> dict[str, Any]:
        """`inferq ray up`, which must go well; what it says of the fabric."""
        done = self.inferq("up", "--port", str(self.port), "--json", *arguments)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{self.logs()}"
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    def status(self) -> dict[str, Any]:
        """`inferq ray status`, whatever its exit code."""
        done = self.inferq("status", "--json")
        assert done.stdout, done.stderr
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    def remove(self, number: int) -> None:
        """SIGKILL all processes of a node; 0 is the head."""
        self._order(f"remove {number}")

    def add(self, resources: Resources) -> int:
        """Another node joins; its number."""
        self._order(f"add {json.dumps(resources)}")
        self.count += 1
        return self.count - 1

    def processes(self, title: str = "") -> list[int]:
        """The process ids of the cluster with ``title`` in their command line."""
        return [pid for pid in session_members(self._program.pid, self._since) if title in command_line(pid)]

    def node_of(self, pid: int) -> int:
        """The process id of the node's daemon that runs the Ray worker ``pid``."""
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    def logs(self) -> str:
        """The last words of all that run in the cluster."""
        files = [*self._session.glob("ray/session_latest/logs/worker-*.err"), self.folder / "nodes.log"]
        tails = ("\n".join(file.read_text("utf-8", "replace").splitlines()[-15:]) for file in files)
        return "\n".join(tail for tail in tails if tail)

    def _order(self, line: str) -> None:
        assert self._program.stdin is not None
        self._program.stdin.write(f"{line}\n")
        self._program.stdin.flush()
        self._answer()

    def _answer(self) -> str:
        assert self._program.stdout is not None
        line = self._program.stdout.readline().strip()  # the program ends if a node does not come up
        assert line, (self.folder / "nodes.log").read_text()
        return line


def command_line(pid: int) -> str:
    """The command line of a process, empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return ""


def main() -> None:
    """Run the nodes until standard input ends."""
    from ray.cluster_utils import Cluster  # noqa: PLC0415 - in the program alone

    cluster = Cluster()
    nodes = [cluster.add_node(object_store_memory=_STORE_BYTES, **json.loads(node)) for node in sys.argv[1:]]
    sys.stdout.write(f"{cluster.address}\n")
    sys.stdout.flush()
    try:
        for line in sys.stdin:
            command, _, what = line.strip().partition(" ")
            if command == "add":
                nodes.append(cluster.add_node(object_store_memory=_STORE_BYTES, **json.loads(what)))
            else:
                cluster.remove_node(nodes[int(what)], allow_graceful=False)
            sys.stdout.write("done\n")
            sys.stdout.flush()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
