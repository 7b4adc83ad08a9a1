"""Adding up the metrics of several processes."""

from __future__ import annotations

from typing import Any

from router.metrics import LOWEST_COUNTS, RouterMetrics
from router.processes.merged_metrics import (
    merge_snapshots,
    render_snapshot,
    sample_value,
    take_snapshot,
    what_stays,
)
from telemetry import render_metrics


def process(answers: int, open_requests: int, *, manager: bool = True) -> RouterMetrics:
    """The metrics of a process that has answered and has open so many requests."""
    metrics = RouterMetrics()
    metrics.watch(
        open_requests=lambda: open_requests,
        round_trips=lambda: answers,
        transfers=lambda: 0,
        manager_reachable=lambda: manager,
    )
    for _ in range(answers):
        metrics.answered("/v1/completions", 200)
        metrics.ttft.observe(("m",), 0.01)
    return metrics


def merged(*snapshots: Any) -> str:
    return render_snapshot(merge_snapshots(snapshots, lowest=LOWEST_COUNTS))[0].decode()


def test_one_process_shows_what_it_shows_alone() -> None:
    """A page through a snapshot has the same lines, but for the figures that move: time and memory of the process."""

    def fixed(page: str) -> list[str]:
        return sorted(line for line in page.splitlines() if not line.startswith("process_"))

    metrics = process(3, 2)
    alone = render_metrics(metrics.registry)[0].decode()
    assert fixed(merged(take_snapshot(metrics.registry))) == fixed(alone)


def test_counts_and_gauges_add_up() -> None:
    """Counters, histograms and gauges are sums; a Manager that one process cannot reach shows; the interpreter's facts
    are not added."""
    page = merged(
        take_snapshot(process(3, 2).registry),
        take_snapshot(process(4, 5, manager=False).registry),
        take_snapshot(process(0, 0).registry),
    )
    for line in (
        'inferq_requests_total{code="200",path="/v1/completions",role="router"} 7.0',
        'inferq_ttft_seconds_bucket{le="0.02",model="m"} 7.0',
        'inferq_ttft_seconds_count{model="m"} 7.0',
        "inferq_open_requests 7.0",
        "inferq_manager_reachable 0.0",
        'inferq_redis_round_trips_total{role="router"} 7.0',
    ):
        assert line in page.splitlines(), line
    assert next(line for line in page.splitlines() if line.startswith("python_info")).endswith(" 1.0")


def test_of_a_process_that_ended_only_totals_stay() -> None:
    """Its answers still count, its open requests do not."""
    ended = what_stays(take_snapshot(process(3, 2).registry))
    whole = merge_snapshots([ended, take_snapshot(process(4, 5).registry)])
    assert sample_value(whole, "inferq_open_requests") == 5
    page = render_snapshot(whole)[0].decode()
    assert 'inferq_requests_total{code="200",path="/v1/completions",role="router"} 7.0' in page
