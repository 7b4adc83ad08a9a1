"""The worker's metrics: queue waits, attempts, tokens, restarts, fenced sessions."""

from __future__ import annotations

from functools import cache

from prometheus_client import Counter, Histogram

from queue_schemas import Lease, Settled
from scheduling.prediction import is_off_by
from telemetry import MetricsRegistry

from .core import AnswerUsage

_ERROR_BUCKETS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 2.0, 5.0)


class WorkerMetrics:
    """The worker's metrics in ``registry``."""

    def __init__(self, registry: MetricsRegistry) -> None:
        self.registry = registry
        wait = registry.histogram("inferq_queue_wait_seconds", "From the enqueue to the claim", ("model", "lane"))
        attempts = registry.counter("inferq_attempts_total", "Attempts by how they ended", ("model", "outcome"))
        tokens = registry.counter(
            "inferq_tokens_total",
            "Tokens by the engine's usage figures, cached ones also among prompt; of streams without them, events",
            ("model", "kind"),
        )
        settled = registry.counter("inferq_settled_total", "The queue's answers to settled attempts", ("answer",))
        remote = registry.counter(
            "inferq_jobs_from_remote_regions_total",
            "Claimed jobs whose Router is in another region",
            ("model", "region"),
        )
        refused = registry.counter(
            "inferq_yields_refused_total",
            "Attempts that were asked to yield and run on, by the reason",
            ("model", "reason"),
        )
        redone = registry.counter(
            "inferq_tokens_redone_total",
            "Tokens computed once more to go on behind them: prefill, as part of a prompt; decode, said anew",
            ("model", "how"),
        )
        self.engine_restarts = registry.counter("inferq_engine_restarts_total", "Starts of the engine after the first")
        self.models_loaded = registry.counter(
            "inferq_models_loaded_total", "Restarts of the engine with another model, as the Manager assigned"
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

        error = registry.histogram(
            "inferq_predicted_wait_error_ratio",
            "By what part of the real wait of a job that had to wait its prediction was wrong",
            ("model", "lane"),
            buckets=_ERROR_BUCKETS,
        )

        # Children are looked up once: labels() costs more than the count itself.
        def wait_of(model: str, lane: str) -> Histogram:
            return wait.labels(model, lane)

        def error_of(model: str, lane: str) -> Histogram:
            return error.labels(model, lane)

        def attempts_of(model: str, outcome: str) -> Counter:
            return attempts.labels(model, outcome)

        def tokens_of(model: str, kind: str) -> Counter:
            return tokens.labels(model, kind)

        def remote_of(model: str, region: str) -> Counter:
            return remote.labels(model, region)

        def refused_of(model: str, reason: str) -> Counter:
            return refused.labels(model, reason)

        def redone_of(model: str, how: str) -> Counter:
            return redone.labels(model, how)

        self.yields_refused = cache(refused_of)
        self.redone = cache(redone_of)
        self.wait = cache(wait_of)
        self._prediction_error = cache(error_of)
        self.remote = cache(remote_of)
        self.attempts = cache(attempts_of)
        self._tokens = cache(tokens_of)
        self._settled = {answer: settled.labels(str(answer)) for answer in Settled}

    def settled(self, answer: Settled) -> None:
        self._settled[answer].inc()

    def started(self, lease: Lease) -> None:
        """Count how long a job has waited, and how wrong its prediction was."""
        job = lease.job
        self.wait(job.model, job.lane.value).observe(lease.waited_ms / 1000)
        if lease.predicted_ms is not None and lease.epoch == 1:  # later it has run in between
            error = is_off_by(lease.predicted_ms, lease.waited_ms)
            self._prediction_error(job.model, job.lane.value).observe(error)

    def usage(self, model: str, usage: AnswerUsage) -> None:
        """Count the tokens of an answer."""
        for kind, tokens in (("prompt", usage.prompt), ("completion", usage.output), ("cached", usage.cached)):
            if tokens:
                self._tokens(model, kind).inc(tokens)
