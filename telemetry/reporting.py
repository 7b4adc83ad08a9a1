"""Set up a process's logs and traces as its settings say, and send the last traces when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .logs import configure_logging
from .settings import TelemetrySettings
from .tracing import configure_tracing, shutdown_tracing


@contextmanager
def reporting(role: str, settings: TelemetrySettings) -> Iterator[None]:
    """Logs and traces of the process of ``role``, for as long as the block runs. Raises ``CannotStart``."""
    configure_logging(role, settings.log_level, settings.log_format)
    configure_tracing(role, settings.otlp_endpoint)
    try:
        yield
    finally:
        shutdown_tracing()
