"""The metrics registry and what a scrape renders."""

import pytest

from telemetry import MetricsRegistry, render_metrics


def test_a_metric_is_made_once() -> None:
    """Asking twice for a name gives the same metric, so two components can count into it."""
    registry = MetricsRegistry("worker")
    registry.counter("inferq_attempts_total", "Attempts", ("outcome",)).labels("done").inc()
    registry.counter("inferq_attempts_total", "Attempts", ("outcome",)).labels("done").inc()
    body, content_type = render_metrics(registry)
    assert b'inferq_attempts_total{outcome="done"} 2.0' in body
    assert content_type.startswith("text/plain")


def test_a_name_keeps_its_kind() -> None:
    """A name that is a counter cannot become a gauge."""
    registry = MetricsRegistry("worker")
    registry.counter("inferq_attempts_total", "Attempts")
    with pytest.raises(TypeError, match="inferq_attempts_total is a Counter"):
        registry.gauge("inferq_attempts_total", "Attempts")


def test_watched_figures_are_read_at_the_scrape() -> None:
    """A watched counter shows the value of the moment somebody asks."""
    registry = MetricsRegistry("manager")
    trips = 3
    registry.watch_round_trips(lambda: trips)
    registry.watch_gauge("inferq_free", "Free", lambda: trips * 2)
    trips = 7
    body, _ = render_metrics(registry)
    assert b'inferq_redis_round_trips_total{role="manager"} 7.0' in body
    assert b"inferq_free 14.0" in body


def test_two_roles_in_one_process_do_not_meet() -> None:
    """Each registry has its own metrics of the same names."""
    one, other = MetricsRegistry("manager"), MetricsRegistry("router")
    one.counter("inferq_requests_total", "Requests").inc()
    other.counter("inferq_requests_total", "Requests")
    assert b"inferq_requests_total 0.0" in render_metrics(other)[0]


def test_counts_and_distributions_show_what_the_clients_own_metrics_do() -> None:
    """What counts for every request renders as prometheus_client's counter and histogram: labels, bounds, sums."""
    ours, theirs = MetricsRegistry("worker"), MetricsRegistry("worker")
    counts = ours.counts("inferq_attempts_total", "Attempts", ("model", "outcome"))
    counter = theirs.counter("inferq_attempts_total", "Attempts", ("model", "outcome"))
    assert ours.counts("inferq_attempts_total", "Attempts", ("model", "outcome")) is counts
    for labels, amount in ((("m", "done"), 1), (("m", "done"), 2.5), (('"m\n', "spent"), 0)):
        counts.add(labels, amount)
        counter.labels(*labels).inc(amount)
    waits = ours.distribution("inferq_wait_seconds", "Waits", ("model",), buckets=(0.5, 1.0))
    histogram = theirs.histogram("inferq_wait_seconds", "Waits", ("model",), buckets=(0.5, 1.0))
    for value in (0.25, 0.5, 0.75, 1.0, 4.0):
        waits.observe(("m",), value)
        histogram.labels("m").observe(value)

    def shown(registry: MetricsRegistry) -> list[str]:
        lines = render_metrics(registry)[0].decode().splitlines()
        return [line for line in lines if "inferq_" in line and "_created" not in line]

    assert shown(ours) == shown(theirs)
    assert 'inferq_wait_seconds_bucket{le="0.5",model="m"} 2.0' in shown(ours)
