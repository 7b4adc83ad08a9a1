"""How much each tenant may keep in the file store."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from queue_schemas import PermissionRefused, Tenant
from storage import StorageUsage

from ..store import AsyncStore

USAGE_VALID_S = 60.0
"""How long a measured usage is relied on: other Routers and the batcher add and remove files, too."""
_MEASURE_AGAIN_AFTER_S = 2.0
"""How old a measured usage must be before it is measured again because it would refuse a file."""


@dataclass(slots=True)
class _Usage:
    """What a tenant stores, as measured at ``measured_s``, and what its uploads have reserved since."""

    stored: StorageUsage = field(default_factory=lambda: StorageUsage(0, 0))
    measured_s: float = float("-inf")
    reserved_files: int = 0
    reserved_bytes: int = 0
    measuring: asyncio.Lock = field(default_factory=asyncio.Lock)


class Reservation:
    """Space for one file that is being uploaded."""

    def __init__(self, quota: StorageQuota, usage: _Usage) -> None:
        self._quota = quota
        self._usage = usage
        self._bytes = 0
        usage.reserved_files += 1

    def grow(self, to_bytes: int) -> None:
        """The file has, or is going to have, so many bytes. Raises ``PermissionRefused``."""
        more = max(0, to_bytes - self._bytes)
        self._bytes += more
        self._usage.reserved_bytes += more
        self._quota.check(self._usage)

    def end(self, kept_bytes: int | None) -> None:
        """The upload is over: the file has so many bytes; None: there is no new file."""
        usage = self._usage
        usage.reserved_files -= 1
        usage.reserved_bytes -= self._bytes
        if kept_bytes is not None:
            usage.stored = StorageUsage(usage.stored.files + 1, usage.stored.bytes + kept_bytes)


class StorageQuota:
    """The quota of every tenant. Each Router measures usage in the store by itself, now and then: until they measure
    again, several Routers together may accept more than the quota."""

    def __init__(self, store: AsyncStore, max_files: int, max_bytes: int) -> None:
        self._store = store
        self._max_files = max_files
        self._max_bytes = max_bytes
        self._usages: dict[Tenant, _Usage] = {}

    async def reserve(self, tenant: Tenant, announced_bytes: int) -> Reservation:
        """Space for one more file of at least that size; end it. Raises ``PermissionRefused``."""
        usage = self._usages.setdefault(tenant, _Usage())
        await self._measure(tenant, usage, USAGE_VALID_S)
        try:
            return self._reserve(usage, announced_bytes)
        except PermissionRefused:
            await self._measure(tenant, usage, _MEASURE_AGAIN_AFTER_S)
        return self._reserve(usage, announced_bytes)

    def check(self, usage: _Usage) -> None:
        """Raises ``PermissionRefused`` for a tenant that would keep too much."""
        if usage.stored.files + usage.reserved_files > self._max_files:
            raise PermissionRefused(
                f"you have {usage.stored.files} files, and may have {self._max_files}: delete some "
                "(DELETE /v1/files/ID)"
            )
        if usage.stored.bytes + usage.reserved_bytes > self._max_bytes:
            raise PermissionRefused(
                f"your files have {usage.stored.bytes} bytes, and with this one they would have more than the "
                f"{self._max_bytes} that you may have: delete some (DELETE /v1/files/ID)"
            )

    def invalidate(self, tenant: Tenant) -> None:
        """The tenant deleted something: measure its usage again when it matters."""
        usage = self._usages.get(tenant)
        if usage is not None:
            usage.measured_s = float("-inf")

    def _reserve(self, usage: _Usage, announced_bytes: int) -> Reservation:
        reservation = Reservation(self, usage)
        try:
            reservation.grow(announced_bytes)
        except PermissionRefused:
            reservation.end(None)
            raise
        return reservation

    async def _measure(self, tenant: Tenant, usage: _Usage, valid_s: float) -> None:
        time = asyncio.get_running_loop().time
        async with usage.measuring:
            if time() - usage.measured_s > valid_s:
                usage.stored = await self._store.run(lambda: self._store.files.usage(tenant))
                usage.measured_s = time()
