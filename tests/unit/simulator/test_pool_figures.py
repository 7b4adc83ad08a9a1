"""What Routers would say of a pool."""

from __future__ import annotations

import pytest

from queue_schemas import LaneDepth
from queue_schemas.lanes import Lane
from scheduling.cost import USUAL_OUTPUT, Usage, cost_of
from simulator.pool_figures import PoolFigures
from simulator.requests import Request, TraceRequest


def requests_of(count: int, prompt_tokens: int = 1) -> list[Request]:
    """One each tenth of a second."""
    return [Request(number, TraceRequest(0.0, prompt_tokens, 1), number / 10) for number in range(count)]


def test_figures_follow_requests() -> None:
    """Waiting with the oldest's age, and running; one that is interrupted waits again, and is the youngest."""
    figures, requests = PoolFigures(), requests_of(100)
    batch = Request(100, TraceRequest(0.0, 1, 1, lane=Lane.BATCH), 2.0)
    for request in (*requests, batch):
        figures.arrived(request)
    for request in (*requests[:3], requests[1]):
        figures.started(request, 9.0)
    figures.finished(requests[1], 9.5)
    figures.failed(requests[3])
    requests[0].queued_at = 9.0
    figures.interrupted(requests[0])
    depth = figures.depth(10.0, 2, 64)
    lane = depth.lanes[Lane.INTERACTIVE]
    assert (lane.waiting, lane.leased, lane.oldest_age_ms) == (97, 1, 9600)
    assert (depth.lanes[Lane.BATCH].waiting, depth.lanes[Lane.BATCH].oldest_age_ms) == (1, 8000)
    assert (depth.waiting, depth.leased, depth.outstanding, depth.oldest_age_ms) == (98, 1, 99, 9600)
    assert (depth.workers, depth.slots) == (2, 64)


def test_they_say_how_fast_requests_come_and_are_served() -> None:
    """As the queue says it: arrivals as the sweep of each second notes them, run times by what requests cost."""
    figures, requests = PoolFigures(), requests_of(60, prompt_tokens=100)
    for request in requests[:10]:
        figures.arrived(request)
    figures.depth(1.0, 1, 8)
    for request in requests[10:]:
        figures.arrived(request)
    figures.started(requests[0], 1.0)
    figures.finished(requests[0], 3.0)
    cost = cost_of(Usage(100, USUAL_OUTPUT))
    lane = figures.depth(61.0, 1, 8).lanes[Lane.INTERACTIVE]
    assert lane.arrivals_per_s == pytest.approx((10 * 30 / 31 + 50) * 30 / 90 / 30, abs=0.001)
    assert figures.depth(61.4, 1, 8).lanes[Lane.INTERACTIVE].arrivals_per_s == lane.arrivals_per_s
    assert (lane.cost, lane.ms_per_job, lane.ms_per_cost) == (59 * cost, 2_000.0, round(2_000 / cost, 3))


def test_of_a_lane_without_requests_nothing_is_known() -> None:
    """As the queue tells nothing of one."""
    figures, (request,) = PoolFigures(), requests_of(1)
    figures.arrived(request)
    figures.started(request, 1.0)
    figures.finished(request, 2.0)
    assert figures.depth(3.0, 1, 8).lanes == dict.fromkeys(Lane, LaneDepth())
