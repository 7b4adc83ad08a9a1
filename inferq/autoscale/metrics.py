"""The autoscaler's metrics for Prometheus."""

from __future__ import annotations

from telemetry import MetricsRegistry


class AutoscaleMetrics:
    """The metrics of the autoscaler of one pool."""

    def __init__(self) -> None:
        self.registry = MetricsRegistry("autoscaler")
        self.acting = self.registry.gauge("inferq_autoscaler_acting", "1 while it acts, 0 while another one does")
        self.wanted = self.registry.gauge(
            "inferq_autoscaler_workers_wanted", "Workers that it goes for now: what the queue calls for, stabilized"
        )
        self._workers = self.registry.gauge(
            "inferq_autoscaler_workers",
            "Workers of the pool: its own that take work (ready), do not yet (starting) or no more (leaving), have not "
            "joined in time (missing), serve another model now (lent), and those of others (foreign)",
            ("state",),
        )
        self.start_up = self.registry.gauge(
            "inferq_autoscaler_start_up_seconds", "How long a worker takes from its start until it takes work"
        )
        self.serves = self.registry.gauge(
            "inferq_autoscaler_worker_jobs_per_second",
            "Interactive jobs that one worker was seen to serve at most while all were full; 0 while unknown",
        )
        self._scalings = self.registry.counter(
            "inferq_autoscaler_scalings_total", "Workers that were started and that were let go", ("direction",)
        )
        self._failures = self.registry.counter(
            "inferq_autoscaler_failures_total",
            "Steps that failed: of the driver, of the Manager, and looks at the queue that told nothing",
            ("cause",),
        )

    def show_workers(self, counts: dict[str, int]) -> None:
        """Show how many workers are in each state."""
        for state, count in counts.items():
            self._workers.labels(state).set(count)

    def scaled(self, direction: str, count: int) -> None:
        """Count workers that were started (``out``) or let go (``in``)."""
        self._scalings.labels(direction).inc(count)

    def failed(self, cause: str) -> None:
        """Count a failed step of the ``driver``, the ``manager`` or the ``queue``."""
        self._failures.labels(cause).inc()
