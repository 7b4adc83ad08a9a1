"""Prometheus metrics: one registry per role, so that several roles can share a process (and a test many of them)."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

_M = TypeVar("_M", bound=Collector)

WAIT_BUCKETS_S = (0.001, 0.005, 0.02, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Seconds; for what a queue or an engine makes people wait (queue wait, TTFT)."""
GAP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12)
"""Seconds; for the gaps between tokens (ITL)."""


class Counts(Collector):
    """A counter by labels for what happens to every request: adding to it costs a fifth of what prometheus_client's own
    takes. For one thread. Only labels that are given count, by value, so their number must be limited."""

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._values: defaultdict[tuple[str, ...], float] = defaultdict(float)

    def add(self, labels: tuple[str, ...], amount: float = 1.0) -> None:
        """Count ``amount`` more; 0 shows labels that have none yet."""
        self._values[labels] += amount

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, value in list(self._values.items()):
            family.add_metric(labels, value)
        return [family]


class Distribution(Collector):
    """A histogram by labels, as :class:`Counts` is a counter; ``buckets`` are upper bounds."""

    def __init__(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._bounds = list(buckets)
        self._counts: dict[tuple[str, ...], list[int]] = {}
        self._sums: dict[tuple[str, ...], float] = {}

    def observe(self, labels: tuple[str, ...], value: float) -> None:
        """One more of ``value``."""
        counts = self._counts.get(labels)
        if counts is None:
            self._sums[labels] = 0.0
            counts = self._counts[labels] = [0] * (len(self._bounds) + 1)
        counts[bisect_left(self._bounds, value)] += 1
        self._sums[labels] += value

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        bounds = [*map(str, self._bounds), "+Inf"]
        for labels, counts in list(self._counts.items()):
            total, buckets = 0, []
            for bound, count in zip(bounds, counts, strict=True):
                total += count
                buckets.append((bound, float(total)))
            family.add_metric(labels, buckets, self._sums[labels])
        return [family]


class MetricsRegistry:
    """The metrics of one role.

    ``counter``, ``gauge`` and ``histogram`` give the metric of that name, made on the first call, as do ``counts`` and
    ``distribution``, for what happens to every request. ``watch_*`` read their value when somebody asks for the
    metrics, which costs nothing before. Names begin with ``inferq_``.
    """

    def __init__(self, role: str) -> None:
        self.role = role
        self.collectors = CollectorRegistry(auto_describe=False)
        self._metrics: dict[str, Collector] = {}
        ProcessCollector(registry=self.collectors)
        PlatformCollector(registry=self.collectors)

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        """A count that only rises; ``name`` ends in ``_total``."""
        return self._get(name, Counter, lambda: Counter(name, text, labels, registry=self.collectors))

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        """A figure that rises and falls."""
        return self._get(name, Gauge, lambda: Gauge(name, text, labels, registry=self.collectors))

    def histogram(
        self, name: str, text: str, labels: Sequence[str] = (), *, buckets: Sequence[float] = WAIT_BUCKETS_S
    ) -> Histogram:
        """A distribution; ``buckets`` are upper bounds in the unit that ``name`` ends in."""
        return self._get(
            name, Histogram, lambda: Histogram(name, text, labels, buckets=buckets, registry=self.collectors)
        )

    def counts(self, name: str, text: str, labels: Sequence[str]) -> Counts:
        """A count by labels that only rises; ``name`` ends in ``_total``."""
        return self._get(name, Counts, lambda: self._registered(Counts(name, text, labels)))

    def distribution(
        self, name: str, text: str, labels: Sequence[str], *, buckets: Sequence[float] = WAIT_BUCKETS_S
    ) -> Distribution:
        """A distribution by labels; ``buckets`` are upper bounds in the unit that ``name`` ends in."""
        return self._get(name, Distribution, lambda: self._registered(Distribution(name, text, labels, buckets)))

    def watch_gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge without labels whose value is ``read()`` at every scrape."""
        self.collectors.register(_Watched(lambda: GaugeMetricFamily(name, text, value=read())))

    def watch_round_trips(self, read: Callable[[], int]) -> None:
        """``inferq_redis_round_trips_total{role}`` from the broker's own count."""

        def family() -> Metric:
            metric = CounterMetricFamily("inferq_redis_round_trips", "Round trips to Redis", labels=["role"])
            metric.add_metric([self.role], read())
            return metric

        self.collectors.register(_Watched(family))

    def _registered(self, metric: _M) -> _M:
        self.collectors.register(metric)
        return metric

    def _get(self, name: str, kind: type[_M], make: Callable[[], _M]) -> _M:
        metric = self._metrics.get(name)
        if metric is None:
            metric = self._metrics[name] = make()
        if not isinstance(metric, kind):
            raise TypeError(f"{name} is a {type(metric).__name__}, not a {kind.__name__}")
        return metric


class _Watched(Collector):
    def __init__(self, family: Callable[[], Metric]) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return [self._family()]


def render_metrics(registry: MetricsRegistry) -> tuple[bytes, str]:
    """The answer to ``GET /metrics``: body and content type."""
    return generate_latest(registry.collectors), CONTENT_TYPE_LATEST
