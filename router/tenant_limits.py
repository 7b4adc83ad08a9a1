"""Limits for all tenants together and for each of them: one tenant may hold less than all, so that none can shut the
others out."""

from __future__ import annotations

from queue_schemas import OverCapacity, Tenant

RETRY_AFTER_S = 1


def tenant_limit(configured: int, limit: int, *, single_tenant: bool) -> int:
    """What one tenant may hold of ``limit``: ``configured``; 0: three quarters, or all of it if there is but one
    tenant."""
    return min(configured, limit) if configured else limit if single_tenant else max(1, limit * 3 // 4)


class TenantLimiter:
    """Counts how much of a limited amount each tenant holds."""

    def __init__(self, limit: int, max_of_tenant: int, *, what: str, setting: str) -> None:
        """``what`` is limited and the ``setting`` of one tenant's limit go into errors."""
        self.used = 0
        self._limit = limit
        self._max_of_tenant = max_of_tenant
        self._what = what
        self._setting = setting
        self._by_tenant: dict[Tenant, int] = {}

    def check(self, tenant: Tenant, amount: int = 1) -> None:
        """Raise ``OverCapacity`` if ``amount`` more is not to be had now."""
        if self.used + amount <= self._limit and self._by_tenant.get(tenant, 0) + amount <= self._max_of_tenant:
            return
        if self.used + amount > self._limit:
            raise OverCapacity(
                f"this router has room for {self._limit} {self._what}, and they are taken; try again in a moment",
                retry_after_s=RETRY_AFTER_S,
            )
        raise OverCapacity(
            f"one tenant may have {self._max_of_tenant} {self._what} at once (setting {self._setting}); try again "
            "when one of your requests has ended",
            retry_after_s=RETRY_AFTER_S,
        )

    def acquire(self, tenant: Tenant, amount: int = 1) -> None:
        """``amount`` more. Raises ``OverCapacity``."""
        self.check(tenant, amount)
        self.force(tenant, amount)

    def force(self, tenant: Tenant, amount: int) -> None:
        """``amount`` more of what exists already and cannot be refused, over the limit, too."""
        self.used += amount
        self._by_tenant[tenant] = self._by_tenant.get(tenant, 0) + amount

    def release(self, tenant: Tenant, amount: int = 1) -> None:
        """``amount`` less."""
        self.used -= amount
        left = self._by_tenant.get(tenant, 0) - amount
        if left:
            self._by_tenant[tenant] = left
        else:
            self._by_tenant.pop(tenant, None)
