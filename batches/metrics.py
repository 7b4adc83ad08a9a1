"""The batcher's Prometheus metrics."""

from __future__ import annotations

from telemetry import MetricsRegistry

_STEP_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class BatchMetrics:
    """All metrics of a batcher."""

    def __init__(self) -> None:
        self.registry = registry = MetricsRegistry("batcher")
        self._lines = registry.counter("inferq_batch_lines_total", "Stored results of lines, by outcome", ("outcome",))
        self.sent_again = registry.counter(
            "inferq_batch_lines_rerun_total",
            "Lines enqueued again because their answer was lost or their engine was busy",
        )
        self._ended = registry.counter("inferq_batches_ended_total", "Batches that ended, by status", ("status",))
        self._failures = registry.counter("inferq_batch_steps_failed_total", "Steps that failed, by error", ("code",))
        self._steps = registry.histogram(
            "inferq_batch_step_seconds", "Duration of steps, by phase", ("phase",), buckets=_STEP_BUCKETS_S
        )
        self.live = registry.gauge("inferq_batches_live", "Batches that have not ended, of all batchers")
        self.in_flight = registry.gauge(
            "inferq_batch_lines_in_flight", "Lines on the queue at the end of the latest step"
        )

    def lines(self, completed: int, failed: int) -> None:
        self._lines.labels("completed").inc(completed)
        self._lines.labels("failed").inc(failed)

    def ended(self, status: str) -> None:
        self._ended.labels(status).inc()

    def failed(self, code: str) -> None:
        self._failures.labels(code).inc()

    def step(self, phase: str, seconds: float) -> None:
        self._steps.labels(phase).observe(seconds)
