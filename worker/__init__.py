"""The Worker: claims jobs when it has a free slot, runs them on its engine, publishes the answers."""

from .settings import WorkerSettings

__all__ = ["WorkerSettings"]
