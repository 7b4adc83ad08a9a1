"""What Routers would say of a pool."""

from __future__ import annotations

from queue_schemas.lanes import Lane
from simulator.pool_figures import PoolFigures
from simulator.requests import Request, TraceRequest


def test_figures_follow_requests() -> None:
    """Waiting with the oldest's age, and running; one that is interrupted waits again, and is the youngest."""
    figures = PoolFigures()
    requests = [Request(number, TraceRequest(0.0, 1, 1), number / 10) for number in range(100)]
    batch = Request(100, TraceRequest(0.0, 1, 1, lane=Lane.BATCH), 2.0)
    for request in (*requests, batch):
        figures.arrived(request)
    for request in (*requests[:3], requests[1]):
        figures.started(request)
    figures.finished(requests[1])
    figures.failed(requests[3])
    requests[0].queued_at = 9.0
    figures.interrupted(requests[0])
    depth = figures.depth(10.0, 2, 64)
    lane = depth.lanes[Lane.INTERACTIVE]
    assert (lane.waiting, lane.leased, lane.oldest_age_ms) == (97, 1, 9600)
    assert (depth.lanes[Lane.BATCH].waiting, depth.lanes[Lane.BATCH].oldest_age_ms) == (1, 8000)
    assert (depth.waiting, depth.leased, depth.outstanding, depth.oldest_age_ms) == (98, 1, 99, 9600)
    assert (depth.workers, depth.slots) == (2, 64)
