"""Limits how many uploads and downloads run at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from queue_schemas import Tenant

from ..tenant_limits import TenantLimiter


class Transfers:
    """The uploads and downloads of one Router. ``on_end`` is called after each."""

    def __init__(self, max_concurrent_transfers: int, max_of_tenant: int, on_end: Callable[[], None]) -> None:
        self._limiter = TenantLimiter(
            max_concurrent_transfers,
            max_of_tenant,
            what="uploads and downloads",
            setting="max_tenant_concurrent_transfers",
        )
        self._on_end = on_end

    @property
    def open(self) -> int:
        """How many run now."""
        return self._limiter.used

    @contextmanager
    def one(self, tenant: Tenant) -> Iterator[None]:
        """Count one more of the tenant's while the block runs. Raises ``OverCapacity``."""
        self._limiter.acquire(tenant)
        try:
            yield
        finally:
            self._limiter.release(tenant)
            self._on_end()
