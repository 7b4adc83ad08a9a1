"""Files on their way in and out: how many at once, and how much a tenant may keep."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from queue_schemas import PermissionRefused, Tenant
from storage import Kept

from ..store import Store
from ..tenant_limits import Share

COUNT_VALID_S = 60.0
"""How long a count of what a tenant keeps is relied on: other Routers and the batcher add and remove, too."""
_RECOUNT_AFTER_S = 2.0
"""How old a count must be before a tenant is counted again that it would refuse."""


class Transfers:
    """The uploads and downloads of one Router."""

    def __init__(self, most: int, max_of_tenant: int, ended: Callable[[], None]) -> None:
        self._open = Share(most, max_of_tenant, what="uploads and downloads", setting="tenant_transfers")
        self._ended = ended

    @property
    def open(self) -> int:
        """How many there are."""
        return self._open.used

    @contextmanager
    def one(self, tenant: Tenant) -> Iterator[None]:
        """One more of the tenant's while the block runs. Raises ``OverCapacity``."""
        self._open.take(tenant)
        try:
            yield
        finally:
            self._open.give_back(tenant)
            self._ended()


@dataclass(slots=True)
class _Count:
    kept: Kept = field(default_factory=lambda: Kept(0, 0))
    at_s: float = float("-inf")
    coming_files: int = 0
    coming_bytes: int = 0
    counting: asyncio.Lock = field(default_factory=asyncio.Lock)


class Claim:
    """Room for one file that comes in."""

    def __init__(self, allowance: StorageQuota, count: _Count) -> None:
        self._allowance = allowance
        self._count = count
        self._bytes = 0
        count.coming_files += 1

    def grow(self, to_bytes: int) -> None:
        """It is going to have so many bytes, or has. Raises ``PermissionRefused``."""
        more = max(0, to_bytes - self._bytes)
        self._bytes += more
        self._count.coming_bytes += more
        self._allowance.check(self._count)

    def end(self, persisted_bytes: int | None) -> None:
        """It is kept, with so many bytes; None: it is not."""
        count = self._count
        count.coming_files -= 1
        count.coming_bytes -= self._bytes
        if persisted_bytes is not None:
            count.kept = Kept(count.kept.files + 1, count.kept.bytes + persisted_bytes)


class StorageQuota:
    """How much each tenant may keep. Counted in the store by each Router for itself, now and then: several may together
    let in what each has room for until they count again."""

    def __init__(self, store: Store, max_files: int, max_bytes: int) -> None:
        self._store = store
        self._max_files = max_files
        self._max_bytes = max_bytes
        self._counts: dict[Tenant, _Count] = {}

    async def claim(self, tenant: Tenant, announced_bytes: int) -> Claim:
        """Room for one more file of at least that size; end it. Raises ``PermissionRefused``."""
        count = self._counts.setdefault(tenant, _Count())
        await self._count_again(tenant, count, COUNT_VALID_S)
        try:
            return self._claim(count, announced_bytes)
        except PermissionRefused:
            await self._count_again(tenant, count, _RECOUNT_AFTER_S)
        return self._claim(count, announced_bytes)

    def check(self, count: _Count) -> None:
        if count.kept.files + count.coming_files > self._max_files:
            raise PermissionRefused(
                f"you keep {count.kept.files} files, and may keep {self._max_files}: delete some (DELETE /v1/files/ID)"
            )
        if count.kept.bytes + count.coming_bytes > self._max_bytes:
            raise PermissionRefused(
                f"your files have {count.kept.bytes} bytes, and with this one they would have more than the "
                f"{self._max_bytes} that you may keep: delete some (DELETE /v1/files/ID)"
            )

    def forget(self, tenant: Tenant) -> None:
        """Something was removed: count again when it matters."""
        count = self._counts.get(tenant)
        if count is not None:
            count.at_s = float("-inf")

    def _claim(self, count: _Count, announced_bytes: int) -> Claim:
        claim = Claim(self, count)
        try:
            claim.grow(announced_bytes)
        except PermissionRefused:
            claim.end(None)
            raise
        return claim

    async def _count_again(self, tenant: Tenant, count: _Count, valid_s: float) -> None:
        time = asyncio.get_running_loop().time
        async with count.counting:
            if time() - count.at_s > valid_s:
                count.kept = await self._store.run(lambda: self._store.files.kept(tenant))
                count.at_s = time()
