"""Real servers of llama.cpp: its own, and llama-cpp-python's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from telemetry.environment import free_port
from tests.integration.worker.fleet import Client, LocalFleet, local_fleet_on
from tests.support.processes import Child, environment
from tests.support.servers import Server

from .environment import LlamacppEnvironment, prepare_llamacpp

MODEL = "smollm2"
SLOTS = 2


@pytest.fixture(scope="session")
def llamacpp() -> LlamacppEnvironment:
    """What is built once, now where it is not there."""
    return prepare_llamacpp()


@contextmanager
def llama_server(built: LlamacppEnvironment, folder: Path, *options: str) -> Iterator[str]:
    """The URL of a ``llama-server`` with two slots, which has just been started."""
    port = free_port()
    command = [str(built.server), "--model", str(built.model), "--alias", MODEL, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--parallel", str(SLOTS), "--ctx-size", "4096", "--threads", "2", *options]
    with _running("llama-server", command, folder):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def python_server(built: LlamacppEnvironment, folder: Path) -> Iterator[str]:
    """The URL of llama-cpp-python's server, which has just been started."""
    port = free_port()
    command = [str(built.python), "-m", "llama_cpp.server", "--model", str(built.model), "--model_alias", MODEL]
    command += ["--host", "127.0.0.1", "--port", str(port), "--n_ctx", "2048", "--n_threads", "2"]
    libraries = str(built.libraries)
    with _running("llama_cpp.server", command, folder, LLAMA_CPP_LIB_PATH=libraries, LD_LIBRARY_PATH=libraries):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def _running(name: str, command: list[str], folder: Path, **variables: str) -> Iterator[Child]:
    child = Child(name, command, folder / f"{name}.log", env=environment(**variables), cwd=folder)
    child.start()
    try:
        yield child
    except BaseException:
        print(child.log_tail())
        raise
    finally:
        child.kill_group()


@pytest.fixture
def server_url(llamacpp: LlamacppEnvironment, tmp_path: Path) -> Iterator[str]:
    """A ``llama-server`` with metrics."""
    with llama_server(llamacpp, tmp_path, "--metrics") as url:
        yield url


@pytest.fixture
async def fleet_and_client(valkey: Server, tmp_path: Path) -> AsyncIterator[tuple[LocalFleet, Client]]:
    """A Manager on an empty queue, and a client of that queue."""
    async with local_fleet_on(valkey, tmp_path) as both:
        yield both


async def until_ready(fleet: LocalFleet, client: Client, url: str, *options: str) -> None:
    """A worker of the engine at ``url`` takes jobs."""
    await fleet.worker("w1", "--engine", "url", "--engine-url", url, *options).until_ready()
    await client.until_listed("w1")
