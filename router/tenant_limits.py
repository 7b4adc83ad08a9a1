"""Bounds that hold for all tenants together, and for each: what one may hold is less than all there is, so that no
tenant can shut the others out."""

from __future__ import annotations

from queue_schemas import OverCapacity, Tenant

RETRY_AFTER_S = 1


def tenant_limit(given: int, limit: int, *, alone: bool) -> int:
    """What one tenant may hold of ``limit``: ``given``; 0: three quarters, or all of it if there is but one tenant."""
    return min(given, limit) if given else limit if alone else max(1, limit * 3 // 4)


class Share:
    """Something of which there is a limited amount, and how much of it each tenant holds."""

    def __init__(self, limit: int, of_tenant: int, *, what: str, setting: str) -> None:
        """``what`` and the names of the two settings go into errors: ``setting`` of one tenant, ``max_...`` of all."""
        self.used = 0
        self._limit = limit
        self._of_tenant = of_tenant
        self._what = what
        self._setting = setting
        self._by_tenant: dict[Tenant, int] = {}

    def held_by(self, tenant: Tenant) -> int:
        """How much the tenant holds."""
        return self._by_tenant.get(tenant, 0)

    def check(self, tenant: Tenant, amount: int = 1) -> None:
        """Raise ``OverCapacity`` if ``amount`` more is not to be had now."""
        if self.used + amount > self._limit:
            raise OverCapacity(
                f"this router has room for {self._limit} {self._what}, and they are taken; try again in a moment",
                retry_after_s=RETRY_AFTER_S,
            )
        if self.held_by(tenant) + amount > self._of_tenant:
            raise OverCapacity(
                f"one tenant may have {self._of_tenant} {self._what} at once (setting {self._setting}); try again when "
                "one of your requests has ended",
                retry_after_s=RETRY_AFTER_S,
            )

    def take(self, tenant: Tenant, amount: int = 1) -> None:
        """``amount`` more. Raises ``OverCapacity``."""
        self.check(tenant, amount)
        self.hold(tenant, amount)

    def hold(self, tenant: Tenant, amount: int) -> None:
        """``amount`` more, of what is there already and cannot be refused."""
        self.used += amount
        self._by_tenant[tenant] = self.held_by(tenant) + amount

    def give_back(self, tenant: Tenant, amount: int = 1) -> None:
        """``amount`` less."""
        self.used -= amount
        left = self.held_by(tenant) - amount
        if left:
            self._by_tenant[tenant] = left
        else:
            self._by_tenant.pop(tenant, None)
