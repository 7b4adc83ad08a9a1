"""Serve the simulated engine as a process of its own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from telemetry.http.server import bind_socket, run_process, run_server

from .app import SimulationApp
from .options import read_options
from .simulation import Simulation

SHUTDOWN_TIMEOUT_S = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; the first line on standard output says where. Returns the exit code."""
    host, port, settings = read_options(argv)
    logging.getLogger("uvicorn.error").addFilter(_is_no_ordered_failure)

    async def serve() -> None:
        listener = bind_socket(host, port)
        sys.stdout.write(f"simulated engine on http://{host}:{listener.getsockname()[1]}\n")
        sys.stdout.flush()
        await run_server(SimulationApp(Simulation(settings)), sock=listener, shutdown_timeout_s=SHUTDOWN_TIMEOUT_S)

    return run_process(serve)


def _is_no_ordered_failure(record: logging.LogRecord) -> bool:
    # An answer left without its end is a bug in other applications; here somebody ordered it.
    return "without completing response" not in record.getMessage()
