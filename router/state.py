"""What pages still share that do not yet take just what they use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from storage import StorageSettings
from webhooks.settings import WebhookSettings

from .files.transfers import StorageQuota, Transfers
from .http.access import Gate
from .http.api_keys import ApiKeys
from .inference.open_requests import OpenRequests
from .lifecycle import Lifecycle
from .metrics import RouterMetrics
from .ports import ManagerPort
from .queue_link import QueueLink
from .settings import RouterSettings
from .store import Store


@dataclass(frozen=True, slots=True)
class RouterState:
    """Going: give each feature's ``xxx_routes`` its own parameters, and pass them in :mod:`router.composition`."""

    settings: RouterSettings
    storage_settings: StorageSettings
    webhook_settings: WebhookSettings
    manager: ManagerPort | None
    store: Store
    keys: ApiKeys
    gate: Gate
    metrics: RouterMetrics
    link: QueueLink
    requests: OpenRequests
    lifecycle: Lifecycle
    transfers: Transfers
    allowance: StorageQuota
    reasons: Callable[[], list[str]]
