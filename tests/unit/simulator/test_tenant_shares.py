"""Fairness between tenants that have work waiting."""

from __future__ import annotations

import pytest

from queue_schemas.lanes import Lane
from simulator.requests import Request, TraceRequest
from simulator.tenant_shares import TenantShares


def arrived(shares: TenantShares, tenant: str, lane: Lane = Lane.INTERACTIVE) -> Request:
    request = Request(0, TraceRequest(0.0, 100, 50, tenant=tenant, lane=lane), 0.0)
    shares.arrived(request)
    return request


def run(shares: TenantShares, request: Request, cached: int = 0) -> None:
    request.cached = cached
    shares.started(request)
    shares.finished(request)


def test_service_is_weighted() -> None:
    """Prompt tokens count once, cached ones a tenth, output twice; all over the tenant's weight."""
    shares = TenantShares({"a": 4.0})
    for tenant in "ab":
        arrived(shares, tenant)
    run(shares, arrived(shares, "a"), cached=100)
    run(shares, arrived(shares, "b"))
    shares.close_window()
    assert shares.fairness() == pytest.approx((110 / 4) / 200)


def test_only_windows_in_which_both_wait_throughout_count() -> None:
    """A tenant whose queue ran empty asked for no more than it got."""
    shares = TenantShares({})
    arrived(shares, "a")
    run(shares, arrived(shares, "b"))
    arrived(shares, "b")
    shares.close_window()
    assert shares.fairness() is None
    run(shares, arrived(shares, "a"))
    run(shares, arrived(shares, "b"))
    shares.close_window()
    assert shares.fairness() == 1.0


def test_lanes_are_apart() -> None:
    """A tenant's batch does not compete with another's interactive requests."""
    shares = TenantShares({})
    for tenant, lane in (("a", Lane.INTERACTIVE), ("b", Lane.BATCH)):
        arrived(shares, tenant, lane)
        run(shares, arrived(shares, tenant, lane))
    shares.close_window()
    assert shares.fairness() is None
