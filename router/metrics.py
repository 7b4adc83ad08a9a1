"""The Router's figures. What is counted per token costs a list index, and becomes a metric when somebody asks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import Counter
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from telemetry import GAP_BUCKETS_S, WAIT_BUCKETS_S, MetricsRegistry


class ModelHistogram(Collector):
    """A histogram by model, for one thread. Models are those of the directory, so their number is bounded."""

    def __init__(self, name: str, text: str, buckets: Sequence[float]) -> None:
        self._name = name
        self._text = text
        self._bounds = list(buckets)
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, model: str, seconds: float) -> None:
        counts = self._counts.get(model)
        if counts is None:
            counts = self._counts[model] = [0] * (len(self._bounds) + 1)
            self._sums[model] = 0.0
        counts[bisect_left(self._bounds, seconds)] += 1
        self._sums[model] += seconds

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=["model"])
        bounds = [*map(str, self._bounds), "+Inf"]
        for model, counts in self._counts.items():
            total = 0
            buckets = []
            for bound, count in zip(bounds, counts, strict=True):
                total += count
                buckets.append((bound, float(total)))
            family.add_metric([model], buckets, self._sums[model])
        return [family]


class RouterMetrics:
    """Everything a Router counts."""

    def __init__(self) -> None:
        self.registry = MetricsRegistry("router")
        self.ttft = ModelHistogram("inferq_ttft_seconds", "From request to first byte of the answer", WAIT_BUCKETS_S)
        self.itl = ModelHistogram("inferq_itl_seconds", "Between pieces of a streamed answer", GAP_BUCKETS_S)
        self.registry.collectors.register(self.ttft)
        self.registry.collectors.register(self.itl)
        self._requests = self.registry.counter(
            "inferq_requests_total", "Answers by path and status", ("role", "path", "code")
        )
        self._answers: dict[tuple[str, int], Counter] = {}
        self.strays = self.registry.counter(
            "inferq_stray_frames_total", "Frames and markers of requests nobody waits for any more"
        )
        self.disconnects = self.registry.counter(
            "inferq_clients_gone_total", "Clients that went away before their answer was complete", ("why",)
        )
        self._cancelled = self.registry.counter(
            "inferq_jobs_cancelled_total",
            "Jobs that this Router cancelled: their client left, was too slow or stalled, the Router gave them up (a "
            "deadline, an error, its own end), or frames of the answer were lost",
            ("why",),
        )
        self.reruns = self.registry.counter(
            "inferq_reruns_total", "Requests put on the queue again because frames of their answer were lost"
        )
        self._interrupted = self.registry.counter(
            "inferq_streams_interrupted_total",
            "Streams that lost their worker after a part was delivered, by how they went on",
            ("how",),
        )

        self._file_bytes = self.registry.counter(
            "inferq_file_bytes_total", "Bytes of files that clients sent (in) and got (out)", ("direction",)
        )

    def file_bytes(self, direction: str, count: int) -> None:
        """So many bytes of a file went ``in`` or ``out``."""
        self._file_bytes.labels(direction).inc(count)

    def interrupted(self, *, continued: bool, compared: bool, broken: bool) -> None:
        """A stream is over that had lost its worker in between, or ends because of it."""
        for how, happened in (("continued", continued), ("compared", compared), ("broken", broken)):
            if happened:
                self._interrupted.labels(how).inc()

    def cancelled(self, why: str) -> None:
        """A job was cancelled; ``why``: client_left, client_slow, client_stalled, given_up or frames_lost."""
        self._cancelled.labels(why).inc()

    def answered(self, path: str, status: int) -> None:
        """One answer to a request on ``path``, which is one of the allowlist."""
        counter = self._answers.get((path, status))
        if counter is None:
            counter = self._answers[(path, status)] = self._requests.labels(self.registry.role, path, str(status))
        counter.inc()

    def watch(
        self,
        *,
        waiting: Callable[[], int],
        round_trips: Callable[[], int],
        transfers: Callable[[], int],
        managed: Callable[[], bool],
    ) -> None:
        """Read these when somebody asks for the metrics."""
        self.registry.watch_gauge("inferq_requests_waiting", "Requests that wait for or stream their answer", waiting)
        self.registry.watch_gauge("inferq_file_transfers", "Uploads and downloads under way", transfers)
        self.registry.watch_gauge(
            "inferq_manager_reachable", "0 while workers cannot join through this Router", lambda: int(managed())
        )
        self.registry.watch_round_trips(round_trips)
