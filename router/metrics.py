"""The Router's Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable

from telemetry import GAP_BUCKETS_S, MetricsRegistry
from telemetry.http.request_context import requests_counted

OPEN_REQUESTS = "inferq_open_requests"
LOWEST_COUNTS = frozenset({"inferq_manager_reachable"})
"""Gauges of which, of several processes, the lowest value counts for all."""


class RouterMetrics:
    """The metrics of one Router."""

    def __init__(self) -> None:
        self.registry = MetricsRegistry("router")
        # Only models of the directory are observed, so their number is limited.
        self.ttft = self.registry.distribution(
            "inferq_ttft_seconds", "From the request to the first byte of the response", ("model",)
        )
        self.itl = self.registry.distribution(
            "inferq_itl_seconds", "Between pieces of a streamed response", ("model",), buckets=GAP_BUCKETS_S
        )
        self._requests = requests_counted(self.registry)
        self.dropped_frames = self.registry.counter(
            "inferq_dropped_frames_total", "Frames and markers dropped because their request is over"
        )
        self.disconnects = self.registry.counter(
            "inferq_client_disconnects_total",
            "Clients that disconnected before their response was complete",
            ("reason",),
        )
        self._cancelled = self.registry.counter(
            "inferq_jobs_cancelled_total",
            "Jobs that this Router cancelled: their client left, was too slow or stalled, the Router abandoned them (a "
            "deadline, an error, its own end), or frames of the response were lost",
            ("reason",),
        )
        self.resubmissions = self.registry.counter(
            "inferq_requests_resubmitted_total", "Requests enqueued again because frames of their response were lost"
        )
        self._interrupted = self.registry.counter(
            "inferq_streams_interrupted_total",
            "Streams that lost their worker after a part was delivered, by outcome",
            ("outcome",),
        )

        self._file_bytes = self.registry.counter(
            "inferq_file_bytes_total", "Bytes of files that clients sent (in) and got (out)", ("direction",)
        )

    def file_bytes(self, direction: str, count: int) -> None:
        """Count bytes of a file that came ``in`` or went ``out``."""
        self._file_bytes.labels(direction).inc(count)

    def interrupted(self, *, continued: bool, compared: bool, broken: bool) -> None:
        """Count a stream that has ended after it lost its worker."""
        for outcome, happened in (("continued", continued), ("compared", compared), ("broken", broken)):
            if happened:
                self._interrupted.labels(outcome).inc()

    def cancelled(self, reason: str) -> None:
        """Count a cancelled job; ``reason``: client_left, client_slow, client_stalled, abandoned or frames_lost."""
        self._cancelled.labels(reason).inc()

    def answered(self, path: str, status: int) -> None:
        """Count a response to a request on ``path``, which is one of the allowlist."""
        self._requests.add((self.registry.role, path, str(status)))

    def watch(
        self,
        *,
        open_requests: Callable[[], int],
        round_trips: Callable[[], int],
        transfers: Callable[[], int],
        manager_reachable: Callable[[], bool],
    ) -> None:
        """Read these gauges at each scrape."""
        self.registry.watch_gauge(OPEN_REQUESTS, "Requests that wait for or stream their response", open_requests)
        self.registry.watch_gauge("inferq_file_transfers", "Uploads and downloads that run now", transfers)
        self.registry.watch_gauge(
            "inferq_manager_reachable",
            "0 while workers cannot join through this Router",
            lambda: int(manager_reachable()),
        )
        self.registry.watch_round_trips(round_trips)
