"""Scaling by lag, as KEDA and the HorizontalPodAutoscaler do it."""

from __future__ import annotations

from queue_schemas import PoolDepth
from simulator.scaling import FleetLoad, LagCount


def load(now_s: float, waiting: int, leased: int, workers: int) -> FleetLoad:
    pool = PoolDepth(model="", waiting=waiting, leased=leased, outstanding=waiting + leased)
    return FleetLoad(now_s, pool, workers)


def test_replicas_follow_the_lag() -> None:
    """Within the bounds, at most the double or four more at a time."""
    scaler = LagCount(threshold=10, least=0, most=20, with_running=False)
    assert scaler.wanted(load(0, 0, 50, 0)) == 0
    assert scaler.wanted(load(15, 11, 0, 0)) == 2
    assert scaler.wanted(load(30, 95, 0, 2)) == 6
    assert scaler.wanted(load(45, 500, 0, 6)) == 12
    assert scaler.wanted(load(60, 500, 0, 12)) == 20


def test_running_requests_count_where_the_metric_is_a_length() -> None:
    """They are in the queue until they are acknowledged."""
    scaler = LagCount(threshold=10, least=0, most=20, with_running=True)
    assert scaler.wanted(load(0, 1, 30, 3)) == 4


def test_a_fleet_shrinks_only_after_five_minutes() -> None:
    """To the most that was asked for meanwhile."""
    scaler = LagCount(threshold=1, least=1, most=9, with_running=False)
    assert scaler.wanted(load(0, 9, 0, 9)) == 9
    assert scaler.wanted(load(150, 4, 0, 9)) == 9
    assert scaler.wanted(load(300, 0, 0, 9)) == 9
    assert scaler.wanted(load(315, 0, 0, 9)) == 4
    assert scaler.wanted(load(600, 0, 0, 4)) == 1
