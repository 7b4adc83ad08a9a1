"""The Manager's metrics for Prometheus: the fleet, the queues, and what the Manager did."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from broker import JobCounts, Reclaimed
from queue_schemas import PoolDepth, WorkerInfo
from telemetry import MetricsRegistry


class FleetMetrics:
    """Gauges that are recomputed at each scrape, and counters of what the Manager did."""

    def __init__(self, registry: MetricsRegistry) -> None:
        self.registry = registry
        self.acting = registry.gauge("inferq_manager_acting", "1 while this Manager acts, 0 in standby")
        self._declared_dead = registry.counter(
            "inferq_sessions_declared_dead_total", "Sessions declared dead, by cause", ("cause",)
        )
        self._reclaimed_jobs = registry.counter(
            "inferq_reclaimed_jobs_total", "Jobs of dead sessions by what became of them", ("outcome",)
        )
        self.expired = registry.counter("inferq_jobs_expired_total", "Jobs ended because their deadline passed")
        self.woken = registry.counter(
            "inferq_workers_woken_total", "Parked workers woken by a sweep because jobs waited"
        )
        self._placed = registry.counter(
            "inferq_models_assigned_total", "Times that a worker was told to load another model", ("model",)
        )
        self.adapters_assigned = registry.counter(
            "inferq_adapters_assigned_total", "Times that a worker was told to load a LoRA adapter"
        )
        self._workers = registry.gauge("inferq_workers", "Workers by model and state", ("model", "state"))
        self._pool_workers = registry.gauge("inferq_pool_workers", "Workers that take work for a model", ("model",))
        self._pool_slots = registry.gauge("inferq_pool_slots", "Slots of the workers of a model", ("model",))
        self._jobs = registry.gauge("inferq_jobs", "Jobs by model, lane and state", ("model", "lane", "state"))
        self._oldest = registry.gauge(
            "inferq_oldest_job_age_seconds", "How long the longest-waiting job has waited", ("model", "lane")
        )

        self._counts = _QueueCounts()
        registry.collectors.register(self._counts)

    def declared_dead(self, cause: str) -> None:
        self._declared_dead.labels(cause).inc()

    def placed(self, model: str) -> None:
        """A worker was told to load ``model``."""
        self._placed.labels(model).inc()

    def reclaimed(self, jobs: Reclaimed) -> None:
        """Count a dead session's jobs; ``resumable``: streams that wait for their Routers to resume them."""
        self._reclaimed_jobs.labels("requeued").inc(jobs.requeued)
        self._reclaimed_jobs.labels("resumable").inc(jobs.lost)
        self._reclaimed_jobs.labels("dead").inc(jobs.dead)
        self._reclaimed_jobs.labels("cancelled").inc(jobs.cancelled)

    def show_workers(self, workers: Iterable[WorkerInfo]) -> None:
        self._workers.clear()
        for worker in workers:
            for model in worker.models or [""]:
                self._workers.labels(model, str(worker.state)).inc()

    def show_pools(self, pools: Iterable[PoolDepth]) -> None:
        self.forget_pools()
        for pool in pools:
            self._pool_workers.labels(pool.model).set(pool.workers)
            self._pool_slots.labels(pool.model).set(pool.slots)
            for lane, depth in pool.lanes.items():
                self._jobs.labels(pool.model, str(lane), "waiting").set(depth.waiting)
                self._jobs.labels(pool.model, str(lane), "leased").set(depth.leased)
                self._oldest.labels(pool.model, str(lane)).set(depth.oldest_age_ms / 1000)

    def show_counts(self, counts: JobCounts) -> None:
        self._counts.latest = counts

    def forget_pools(self) -> None:
        """Redis did not answer: no value is better than an old one."""
        self._counts.latest = None
        for gauge in (self._jobs, self._oldest, self._pool_workers, self._pool_slots):
            gauge.clear()


class _QueueCounts(Collector):
    """The queue's own counters, which outlive every process: all Managers show the same ones."""

    def __init__(self) -> None:
        self.latest: JobCounts | None = None

    def collect(self) -> Iterable[Metric]:
        events = CounterMetricFamily(
            "inferq_job_events", "What happened to jobs, by the queue's count", labels=["model", "lane", "event"]
        )
        stopped = CounterMetricFamily(
            "inferq_jobs_stopped",
            "Jobs cancelled or expired: while waiting, while running, or because their Router was gone",
            labels=["model", "lane", "state", "cause"],
        )
        affinity = CounterMetricFamily(
            "inferq_jobs_affinity",
            "Attempts started, by whether their worker was known to hold their prefix; none: too short to matter",
            labels=["model", "lane", "outcome"],
        )
        if self.latest is not None:
            for (model, lane, outcome), count in self.latest.affinity.items():
                affinity.add_metric([model, str(lane), outcome], count)
            for (model, lane, event), count in self.latest.events.items():
                events.add_metric([model, str(lane), event], count)
            for (model, lane, event), count in self.latest.stopped.items():
                stopped.add_metric([model, str(lane), *event.split("/", 1)], count)
        return [events, stopped, affinity]
