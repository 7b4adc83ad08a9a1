"""The notifier's Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable

from telemetry import MetricsRegistry


class NotifierMetrics:
    """All metrics of a notifier."""

    def __init__(self, registry: MetricsRegistry) -> None:
        self._registry = registry
        attempts = registry.counter("inferq_webhook_attempts_total", "Delivery attempts, by result", ["result"])
        self.delivered = attempts.labels("delivered")
        self.failed = attempts.labels("failed")
        self.given_up = registry.counter(
            "inferq_webhook_deliveries_given_up_total", "Deliveries given up after all their attempts"
        )
        self.disabled = registry.counter(
            "inferq_webhook_endpoints_disabled_total", "Endpoints disabled because they answered 410 or failed for days"
        )
        self.events = registry.counter(
            "inferq_webhook_events_total", "Events of ended responses that were queued for endpoints"
        )
        self.seconds = registry.histogram("inferq_webhook_attempt_seconds", "Duration of attempts")

    def watch(
        self, *, pending: Callable[[], float], oldest_s: Callable[[], float], running: Callable[[], float]
    ) -> None:
        """Add gauges that are read when the metrics are scraped."""
        self._registry.watch_gauge("inferq_webhook_deliveries_pending", "Deliveries that are not settled", pending)
        self._registry.watch_gauge(
            "inferq_webhook_oldest_pending_seconds", "Age of the oldest event with a pending delivery", oldest_s
        )
        self._registry.watch_gauge("inferq_webhook_attempts_running", "Attempts that run now", running)
