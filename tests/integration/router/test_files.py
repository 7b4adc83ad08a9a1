"""Files with the unmodified OpenAI SDK against a Router process, which is killed, watched and run out of disk."""

from __future__ import annotations

import hashlib
import os
import resource
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from storage.objects import MARK
from telemetry.environment import free_port
from tests.support.processes import Child, answers, environment
from tests.support.waiting import eventually

KEYS = {name: f"sk-{name}" for name in ("acme", "rival")}
HEAD = (
    b"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-acme\r\ncontent-length: 9000000\r\n"
    b"content-type: multipart/form-data; boundary=B\r\n\r\n"
    b'--B\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
)


class Process:
    """A Router with a store and no Redis to reach: files do not need one."""

    def __init__(self, folder: Path) -> None:
        self.store = folder / "store"
        self.port = free_port()
        env = environment()
        env["INFERQ_ROUTER_API_KEYS"] = ",".join(
            f"{hashlib.sha256(key.encode()).hexdigest()}:{name}" for name, key in KEYS.items()
        )
        flags = f"--port {self.port} --redis-url redis://127.0.0.1:{free_port()} --storage-url {self.store}"
        args = [sys.executable, "-m", "router.service", *flags.split()]
        self.child = Child("router", args, folder / "router.log", env=env, cwd=folder)

    def start(self) -> Process:
        self.child.start()
        self.child.until(lambda: answers(f"http://127.0.0.1:{self.port}/healthz"), 20)
        return self

    def options(self, tenant: str = "acme") -> Any:
        return {"base_url": f"http://127.0.0.1:{self.port}/v1", "api_key": KEYS[tenant], "max_retries": 0}

    def client(self, tenant: str = "acme") -> openai.OpenAI:
        return openai.OpenAI(**self.options(tenant))

    def most_memory(self) -> int:
        """The most bytes that it has ever held."""
        status = Path(f"/proc/{self.child.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def lying(self) -> list[Path]:
        """What lies in the store."""
        return [path for path in self.store.rglob("*") if path.is_file() and path.name != MARK]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(tmp_path_factory.mktemp("files"))
    yield process.start()
    process.child.kill_group()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Process]:
    """One that may be hurt."""
    process = Process(tmp_path)
    yield process.start()
    process.child.kill_group()


def test_the_sdk_knows_files(served: Process) -> None:
    """Create, retrieve, list through pages, content and delete; what is not there is NotFoundError."""
    client = served.client()
    made = [
        client.files.create(
            file=(f"{number}.jsonl", b"{}\n" * number),
            purpose="batch",
            expires_after={"anchor": "created_at", "seconds": 3_600},
        )
        for number in range(3)
    ]
    assert made[2].expires_at == made[2].created_at + 3_600
    assert (made[2].object, made[2].status, made[2].bytes) == ("file", "processed", 6)
    assert client.files.retrieve(made[1].id) == made[1]
    assert {file.id for file in client.files.list(limit=2, order="asc")} == {file.id for file in made}
    assert client.files.content(made[2].id).read() == b"{}\n" * 2
    assert client.files.wait_for_processing(made[0].id) == made[0]
    deleted = client.files.delete(made[0].id)
    assert (deleted.id, deleted.deleted) == (made[0].id, True)
    with pytest.raises(openai.NotFoundError) as missing:
        client.files.retrieve(made[0].id)
    assert missing.value.code == "not_found"
    with pytest.raises(openai.BadRequestError, match="purpose must be one of"):
        client.files.create(file=b"1", purpose="nothing")  # type: ignore[arg-type]


async def test_the_async_sdk_and_another_tenant(served: Process) -> None:
    """The same with the asynchronous client; another tenant's key opens nothing."""
    async with openai.AsyncOpenAI(**served.options()) as client, openai.AsyncOpenAI(**served.options("rival")) as rival:
        made = await client.files.create(file=("ä.bin", b"1"), purpose="user_data")
        assert made.filename == "ä.bin"
        assert made.id in [file.id async for file in client.files.list(purpose="user_data")]
        assert [file.id async for file in rival.files.list()] == []
        for attempt in (rival.files.retrieve, rival.files.content, rival.files.delete):
            with pytest.raises(openai.NotFoundError):
                await attempt(made.id)
        assert (await (await client.files.content(made.id)).aread()) == b"1"


def test_memory_stays_flat(served: Process) -> None:
    """30 MB in and out cost the process no more than some pieces of it."""
    client, data = served.client(), os.urandom(30_000_000)
    client.files.content(client.files.create(file=data[:2_000_000], purpose="user_data").id).read()
    before = served.most_memory()
    made = client.files.create(file=data, purpose="user_data")
    assert client.files.content(made.id).read() == data
    grown = served.most_memory() - before
    print(f"grown by {grown / 1e6:.1f} MB")
    assert grown < 10_000_000


def _begun(process: Process) -> socket.socket:
    """An upload that has sent 4 of its 9 MB."""
    connection = socket.create_connection(("127.0.0.1", process.port))
    connection.sendall(HEAD + b"x" * 4_000_000)
    return connection


async def test_a_killed_router_leaves_no_file(own: Process) -> None:
    """SIGKILL in the middle of an upload: nothing of it is a file, and what is there stays whole."""
    there = own.client().files.create(file=b"before", purpose="user_data")
    with _begun(own):
        await eventually(lambda: any(path.parent.name == ".writing" for path in own.lying()), "it is being written")
        own.child.kill()
    own.start()
    assert [file.id for file in own.client().files.list()] == [there.id]
    assert own.client().files.content(there.id).read() == b"before"


async def test_a_full_disk_and_a_broken_connection_leave_nothing(served: Process) -> None:
    """507 for what there is no room for, and no part of it stays; nor does one of an upload whose client is cut off."""
    there = served.lying()
    with _begun(served):
        await eventually(lambda: len(served.lying()) > len(there), "it is being written")
    await eventually(lambda: served.lying() == there, "the part that came is removed")
    resource.prlimit(served.child.pid, resource.RLIMIT_FSIZE, (3_000_000, resource.RLIM_INFINITY))
    try:
        with pytest.raises(openai.APIStatusError) as full:
            served.client().files.create(file=b"x" * 5_000_000, purpose="batch")
        assert (full.value.status_code, full.value.code) == (507, "store_full")
        await eventually(lambda: served.lying() == there, "the part that came is removed")
        assert served.client().files.create(file=b"x", purpose="batch").bytes == 1
    finally:
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(served.child.pid, resource.RLIMIT_FSIZE, unlimited)
