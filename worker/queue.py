"""The queue as a worker has it: beside Redis, or over HTTP through a Router. Both have the same calls."""

from __future__ import annotations

from broker import Broker

from .over_http.queue import HttpQueue

Queue = Broker | HttpQueue
