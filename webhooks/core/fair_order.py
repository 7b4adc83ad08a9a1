"""Choose which due deliveries to attempt next: the longest due first, within limits for each endpoint and tenant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..deliveries import DeliveryKey


@dataclass(frozen=True, slots=True)
class Limits:
    """Maximum concurrent attempts."""

    endpoint: int
    tenant: int
    all: int


def choose_next(
    next_at_ms: Mapping[DeliveryKey, int], running: Collection[DeliveryKey], now_ms: int, limits: Limits
) -> list[DeliveryKey]:
    """The pending deliveries (``next_at_ms``, oldest first) to attempt now, in addition to those that run."""
    endpoints = Counter((key.tenant, key.endpoint_id) for key in running)
    tenants = Counter(key.tenant for key in running)
    due = [key for key, at_ms in next_at_ms.items() if at_ms <= now_ms and key not in running]
    due.sort(key=next_at_ms.__getitem__)  # stable: the oldest first among equals
    chosen: list[DeliveryKey] = []
    for key in due:
        if len(running) + len(chosen) >= limits.all:
            break
        endpoint = (key.tenant, key.endpoint_id)
        if endpoints[endpoint] < limits.endpoint and tenants[key.tenant] < limits.tenant:
            endpoints[endpoint] += 1
            tenants[key.tenant] += 1
            chosen.append(key)
    return chosen
