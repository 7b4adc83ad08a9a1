"""The worker's metrics: queue waits, attempts, tokens, restarts, fenced sessions."""

from __future__ import annotations

from queue_schemas import Lease, Settled
from scheduling.prediction import is_off_by
from telemetry import MetricsRegistry

from .core import AnswerUsage

_ERROR_BUCKETS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 2.0, 5.0)


class WorkerMetrics:
    """The worker's metrics in ``registry``."""

    def __init__(self, registry: MetricsRegistry) -> None:
        self.registry = registry
        self._waits = registry.distribution(
            "inferq_queue_wait_seconds", "From the enqueue to the claim", ("model", "lane")
        )
        self._prediction_errors = registry.distribution(
            "inferq_predicted_wait_error_ratio",
            "By what part of the real wait of a job that had to wait its prediction was wrong",
            ("model", "lane"),
            buckets=_ERROR_BUCKETS,
        )
        self._attempts = registry.counts("inferq_attempts_total", "Attempts by how they ended", ("model", "outcome"))
        self._tokens = registry.counts(
            "inferq_tokens_total",
            "Tokens by the engine's usage figures, cached ones also among prompt; of streams without them, events",
            ("model", "kind"),
        )
        self._settled = registry.counts("inferq_settled_total", "The queue's answers to settled attempts", ("answer",))
        for answer in Settled:
            self._settled.add((answer.value,), 0)
        self._remote = registry.counts(
            "inferq_jobs_from_remote_regions_total",
            "Claimed jobs whose Router is in another region",
            ("model", "region"),
        )
        self._yields_refused = registry.counts(
            "inferq_yields_refused_total",
            "Attempts that were asked to yield and run on, by the reason",
            ("model", "reason"),
        )
        self._redone = registry.counts(
            "inferq_tokens_redone_total",
            "Tokens computed once more to go on behind them: prefill, as part of a prompt; decode, said anew",
            ("model", "how"),
        )
        self.engine_restarts = registry.counter("inferq_engine_restarts_total", "Starts of the engine after the first")
        self.models_loaded = registry.counter(
            "inferq_models_loaded_total", "Restarts of the engine with another model, as the Manager assigned"
        )
        self.adapter_changes = registry.counter(
            "inferq_adapter_changes_total",
            "LoRA adapters that the engine loaded, unloaded, or could not load, as the Manager assigned",
            ("change",),
        )
        self.fallback_reclaimed = registry.counter(
            "inferq_fallback_reclaimed_jobs_total",
            "Jobs of dead workers that this one put back on the queue because no Manager acted",
        )
        self.fenced = registry.counter(
            "inferq_sessions_fenced_total", "Sessions of this worker that were declared dead while they lived"
        )
        self.heartbeats_failed = registry.counter(
            "inferq_heartbeats_failed_total", "Heartbeats that no Manager answered"
        )

    def ended(self, model: str, outcome: str) -> None:
        """Count an attempt that is over."""
        self._attempts.add((model, outcome))

    def settled(self, answer: Settled) -> None:
        """Count what the queue answered to the end of an attempt."""
        self._settled.add((answer.value,))

    def started(self, lease: Lease) -> None:
        """Count how long a job has waited, and how wrong its prediction was."""
        job = lease.job
        labels = (job.model, job.lane.value)
        self._waits.observe(labels, lease.waited_ms / 1000)
        if lease.predicted_ms is not None and lease.epoch == 1:  # later it has run in between
            self._prediction_errors.observe(labels, is_off_by(lease.predicted_ms, lease.waited_ms))

    def remote(self, model: str, region: str) -> None:
        """Count a job that a Router of another ``region`` takes the answer of."""
        self._remote.add((model, region))

    def yield_refused(self, model: str, reason: str) -> None:
        """Count an attempt that was asked to yield and runs on."""
        self._yields_refused.add((model, reason))

    def redone(self, model: str, how: str, tokens: float) -> None:
        """Count tokens that were computed before: ``prefill`` or ``decode``."""
        self._redone.add((model, how), tokens)

    def usage(self, model: str, usage: AnswerUsage) -> None:
        """Count the tokens of an answer."""
        if usage.prompt:
            self._tokens.add((model, "prompt"), usage.prompt)
        if usage.output:
            self._tokens.add((model, "completion"), usage.output)
        if usage.cached:
            self._tokens.add((model, "cached"), usage.cached)
