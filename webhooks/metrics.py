"""The notifier's figures."""

from __future__ import annotations

from collections.abc import Callable

from telemetry import MetricsRegistry


class NotifierMetrics:
    """What a notifier counts."""

    def __init__(self, registry: MetricsRegistry) -> None:
        self._registry = registry
        attempts = registry.counter(
            "inferq_webhook_attempts_total", "Attempts to deliver webhooks by their result", ["result"]
        )
        self.delivered = attempts.labels("delivered")
        self.failed = attempts.labels("failed")
        self.given_up = registry.counter(
            "inferq_webhook_deliveries_given_up_total", "Webhooks that were given up after all their attempts"
        )
        self.disabled = registry.counter(
            "inferq_webhook_endpoints_disabled_total", "Endpoints disabled: they answered 410, or took nothing for days"
        )
        self.events = registry.counter("inferq_webhook_events_total", "Ends of responses that were told to endpoints")
        self.seconds = registry.histogram("inferq_webhook_attempt_seconds", "How long attempts took")

    def watch(
        self, *, pending: Callable[[], float], oldest_s: Callable[[], float], running: Callable[[], float]
    ) -> None:
        """QueueStats that are read when somebody asks."""
        self._registry.watch_gauge("inferq_webhook_deliveries_pending", "Webhooks not yet delivered", pending)
        self._registry.watch_gauge(
            "inferq_webhook_oldest_pending_seconds", "Age of the oldest event that is not yet delivered", oldest_s
        )
        self._registry.watch_gauge("inferq_webhook_attempts_running", "Attempts that run", running)
