"""What all sessions of one worker share: its settings, engine, way to the Manager, metrics, and its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from queue_schemas import RegistrationAnswer

from .engines import Engine
from .engines.adapter_folder import AdapterFolder
from .engines.process import ProcessEngine
from .metrics import WorkerMetrics
from .queue import Queue
from .registration.manager_client import ManagerClient
from .settings import WorkerSettings


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What outlives a session. ``connect`` opens the queue named in a registration's answer, once."""

    settings: WorkerSettings
    engine: Engine
    client: ManagerClient
    metrics: WorkerMetrics
    url: str | None
    """Where the Manager may reach this worker's HTTP service."""
    connect: Callable[[RegistrationAnswer], Awaitable[Queue]]
    drain: asyncio.Event
    """Set once: claim no more, finish, end."""
    hurry: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once: while draining, wait for no running job."""
    switching: ProcessEngine | None = None
    """``engine``, if it can load another model."""
    adapters: AdapterFolder | None = None
    """The LoRA adapters that ``engine`` may load while it serves."""
