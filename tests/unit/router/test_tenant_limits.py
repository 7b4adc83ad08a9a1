"""What one tenant may hold, of what there is for all."""

from __future__ import annotations

import pytest

from queue_schemas import OverCapacity, Tenant
from router.tenant_limits import TenantLimiter, tenant_limit

ACME, RIVAL = Tenant("acme"), Tenant("rival")


def test_a_tenant_may_hold_less_than_the_total() -> None:
    """[B9] At its bound a tenant is refused and others are not; what it gives back it may have again."""
    limiter = TenantLimiter(4, 3, what="things", setting="tenant_things")
    limiter.acquire(ACME, 3)
    with pytest.raises(OverCapacity, match=r"one tenant may have 3 things at once \(setting tenant_things.*try again"):
        limiter.acquire(ACME)
    limiter.acquire(RIVAL)
    with pytest.raises(OverCapacity, match="this router has room for 4 things"):
        limiter.acquire(RIVAL)
    limiter.release(ACME, 3)
    limiter.release(RIVAL)
    assert limiter.used == 0
    limiter.acquire(ACME, 3)


def test_forced_amounts_count_towards_the_limit() -> None:
    """[B2] What is held beyond the bound keeps more from being taken."""
    limiter = TenantLimiter(10, 10, what="bytes", setting="tenant_bytes")
    limiter.force(ACME, 25)
    with pytest.raises(OverCapacity):
        limiter.check(RIVAL)
    limiter.release(ACME, 25)
    limiter.check(RIVAL, 10)


@pytest.mark.parametrize(
    ("given", "limit", "single_tenant", "limit_of_tenant"),
    [(0, 64, False, 48), (0, 64, True, 64), (0, 1, False, 1), (9, 64, False, 9), (9, 64, True, 9), (99, 64, False, 64)],
)
def test_the_limit_of_a_tenant(given: int, limit: int, single_tenant: bool, limit_of_tenant: int) -> None:
    """What is set, never more than there is; else three quarters, or all where there is one tenant only."""
    assert tenant_limit(given, limit, single_tenant=single_tenant) == limit_of_tenant
