"""What one tenant may hold, of what there is for all."""

from __future__ import annotations

import pytest

from queue_schemas import OverCapacity, Tenant
from router.tenant_limits import Share, tenant_limit

ACME, RIVAL = Tenant("acme"), Tenant("rival")


def test_a_tenant_may_hold_less_than_there_is() -> None:
    """[B9] At its bound a tenant is refused and others are not; what it gives back it may have again."""
    share = Share(4, 3, what="things", setting="tenant_things")
    share.take(ACME, 3)
    with pytest.raises(OverCapacity, match=r"one tenant may have 3 things at once \(setting tenant_things.*try again"):
        share.take(ACME)
    share.take(RIVAL)
    with pytest.raises(OverCapacity, match="this router has room for 4 things"):
        share.take(RIVAL)
    share.give_back(ACME, 3)
    share.give_back(RIVAL)
    assert (share.used, share.held_by(ACME), share.held_by(RIVAL)) == (0, 0, 0)
    share.take(ACME, 3)


def test_what_cannot_be_refused_counts_all_the_same() -> None:
    """[B2] What is held beyond the bound keeps more from being taken."""
    share = Share(10, 10, what="bytes", setting="tenant_bytes")
    share.hold(ACME, 25)
    with pytest.raises(OverCapacity):
        share.check(RIVAL)
    share.give_back(ACME, 25)
    share.check(RIVAL, 10)


@pytest.mark.parametrize(
    ("given", "limit", "alone", "limit_of_tenant"),
    [(0, 64, False, 48), (0, 64, True, 64), (0, 1, False, 1), (9, 64, False, 9), (9, 64, True, 9), (99, 64, False, 64)],
)
def test_the_bound_of_a_tenant(given: int, limit: int, alone: bool, limit_of_tenant: int) -> None:
    """What is set, never more than there is; else three quarters, or all where there is one tenant only."""
    assert tenant_limit(given, limit, alone=alone) == limit_of_tenant
