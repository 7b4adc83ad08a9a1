"""The jobs that a worker runs now: asking the engine, relaying its answer, and reporting the end to the queue."""

from .attempt import Attempt, StopReason, StreamTimeouts
from .attempt_set import Attempts

__all__ = ["Attempt", "Attempts", "StopReason", "StreamTimeouts"]
