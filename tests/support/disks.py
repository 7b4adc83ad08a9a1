"""A small disk below a server's append-only file."""

from __future__ import annotations

import resource
from pathlib import Path

from .servers import Server, server_binary


def server_with_a_small_disk(folder: Path) -> Server:
    """A Valkey that survives a write refused for size, as it would one refused for space; started."""
    binary = server_binary()
    folder.mkdir(exist_ok=True)
    wrapper = folder / "valkey-server"
    wrapper.write_text(f"#!/bin/sh\ntrap '' XFSZ\nexec {binary} \"$@\"\n")
    wrapper.chmod(0o755)
    return Server(str(wrapper), folder / "data").start()


def fill_disk(server: Server) -> None:
    """From now on no file of the server may grow."""
    size = max(path.stat().st_size for path in (server.folder / "appendonlydir").iterdir())
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def free_disk(server: Server) -> None:
    """There is room again."""
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
