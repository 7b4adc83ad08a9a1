"""What a scaler sees of a pool."""

from __future__ import annotations

import pytest

from queue_schemas.lanes import Lane
from simulator.pool_figures import PoolFigures
from simulator.requests import Request, TraceRequest


def test_figures_follow_requests() -> None:
    """Waiting with the oldest's age, running and for how long, and arrivals of the interactive lane a second."""
    figures = PoolFigures()
    requests = [Request(number, TraceRequest(0.0, 1, 1), number / 10) for number in range(100)]
    batch = Request(100, TraceRequest(0.0, 1, 1, lane=Lane.BATCH), 0.0)
    for request in (*requests, batch):
        figures.arrived(request)
    for request in requests[:3]:
        request.began_at = 5.0
        figures.started(request)
    figures.finished(requests[1], 7.5)
    figures.failed(requests[3])
    load = figures.load(10.0, 2, 64)
    lane = load.lanes[Lane.INTERACTIVE]
    assert (lane.waiting, lane.leased, load.workers, load.slots) == (96, 2, 2, 64)
    assert (lane.oldest_age_ms, lane.run_ms) == (pytest.approx(9600), 2500)
    assert (load.lanes[Lane.BATCH].waiting, load.lanes[Lane.BATCH].run_ms) == (1, None)
    assert load.arrivals_per_s == pytest.approx(10 * 10 / 40)
    for second in range(2, 40):
        for _ in range(50):
            figures.arrived(Request(0, TraceRequest(0.0, 1, 1), 0.0))
        load = figures.load(second * 10.0, 2, 64)
    assert load.arrivals_per_s == pytest.approx(5.0, rel=0.05)
