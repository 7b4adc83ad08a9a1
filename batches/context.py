"""What every step of every batch needs: the file store, the link to the queue, the settings, clocks and metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from broker import Broker
from queue_schemas import BrokerUnavailable
from storage import BatchStore, FileStore, ObjectStore

from .metrics import BatchMetrics
from .settings import BatchSettings


@dataclass(slots=True)
class BatchContext:
    """``now_s`` is the wall clock, ``tick_s`` a monotonic one. ``broker`` is None while the queue cannot be reached,
    for the reason ``why``."""

    settings: BatchSettings
    max_input_bytes: int
    """Maximum size of an input file."""
    store: ObjectStore
    metrics: BatchMetrics
    now_s: Callable[[], float]
    tick_s: Callable[[], float]
    broker: Broker | None = None
    why: str = "not connected yet"
    stopping: bool = False
    """The process shuts down: the running step ends early."""

    @property
    def files(self) -> FileStore:
        return FileStore(self.store)

    @property
    def batches(self) -> BatchStore:
        return BatchStore(self.store)

    def queue(self) -> Broker:
        """The queue. Raises ``BrokerUnavailable``."""
        if self.broker is None:
            raise BrokerUnavailable(f"the queue cannot be reached: {self.why}", retry_after_s=2)
        return self.broker
