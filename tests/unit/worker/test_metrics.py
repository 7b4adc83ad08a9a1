"""The worker's metrics."""

from __future__ import annotations

import pytest

from queue_schemas import Lease
from telemetry import MetricsRegistry, render_metrics
from tests.support.queue import make_job
from worker.core import read_usage
from worker.metrics import WorkerMetrics

USAGE = b'"usage": {"prompt_tokens" : 7, "completion_tokens":5}'


def tokens(end: bytes, events: int) -> tuple[float, float]:
    """Prompt and completion tokens that are counted for an answer that ends with ``end``."""
    metrics = WorkerMetrics(MetricsRegistry("worker"))
    metrics.usage("sim", read_usage(end, events))
    shown = render_metrics(metrics.registry)[0].decode()

    def of(kind: str) -> float:
        line = next((one for one in shown.splitlines() if f'kind="{kind}"' in one and "_total{" in one), "x 0")
        return float(line.rpartition(" ")[2])

    return of("prompt"), of("completion")


@pytest.mark.parametrize(
    ("end", "counted"),
    [
        (b"{%b}" % USAGE, (7, 5)),
        (b"x" * 5_000 + USAGE + b"}" * 1_000, (7, 5)),
        (b'{"text": "\\"usage\\" \\"prompt_tokens\\": 1", %b}' % USAGE, (7, 5)),
        (b'{"prompt_tokens": 3, "completion_tokens": 2}', (3, 2)),
        (USAGE + b"x" * 5_000, (0, 9)),
        (b"", (0, 9)),
    ],
    ids=["plain", "at the end of much", "behind text about it", "without its name", "out of sight", "none"],
)
def test_tokens_are_those_of_the_engines_usage_else_events(end: bytes, counted: tuple[float, float]) -> None:
    """Usage is looked for in the last 2 kB of an answer; without it a stream's events are counted."""
    assert tokens(end, 9) == counted


def test_the_error_of_a_prediction_is_that_of_the_first_wait() -> None:
    """What yielded or was handed back has run since, for which nobody predicted anything."""
    metrics = WorkerMetrics(MetricsRegistry("worker"))
    for epoch, waited_ms in ((1, 900), (2, 600_000)):
        metrics.started(Lease(make_job(), epoch, f"a{epoch}", 1, 60_000, waited_ms, predicted_ms=1_000))
    shown = render_metrics(metrics.registry)[0].decode()
    (count,) = (line for line in shown.splitlines() if line.startswith("inferq_predicted_wait_error_ratio_count"))
    assert count.endswith(" 1.0")
