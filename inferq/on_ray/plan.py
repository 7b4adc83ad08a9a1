"""What is to run in the cluster, and a mark by which to see whether it does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from pydantic import SecretStr

from broker import BrokerSettings
from inferq import __version__
from manager.settings import ManagerSettings
from queue_schemas import RAY_MANAGER
from router.settings import RouterSettings
from storage import StorageSettings
from telemetry import RoleSettings, TelemetrySettings
from webhooks.settings import WebhookSettings

from .settings import RaySettings

_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - addresses to be replaced
_OF_THE_FLEET = frozenset(
    {
        *("host", "port", "way_in", "min_replicas", "max_replicas", "target_open_requests"),
        *("up_delay_ms", "down_delay_ms", "replica_cpus"),
    }
)
"""The settings of table ``[ray]`` that make the application what it is."""


@dataclass(frozen=True, slots=True)
class RayPlan:
    """The settings of everything that runs in the cluster."""

    ray: RaySettings
    router: RouterSettings
    manager: ManagerSettings
    broker: BrokerSettings
    storage: StorageSettings
    webhooks: WebhookSettings
    telemetry: TelemetrySettings

    @classmethod
    def load(cls, ray: RaySettings, *, redis_url: str | None = None) -> Self:
        """The roles' settings as everywhere, but for the Router's address and Manager."""
        router = RouterSettings.load(manager_urls=f"ray:{RAY_MANAGER}", host=ray.host, port=ray.port)
        if "lame_duck_ms" not in router.model_fields_set:
            router = router.model_copy(update={"lame_duck_ms": ray.lame_duck_ms})
        return cls(
            ray,
            router,
            ManagerSettings.load(),
            BrokerSettings.load(redis_url=redis_url),
            StorageSettings.load(),
            WebhookSettings.load(),
            TelemetrySettings.load(),
        )

    @property
    def manager_digest(self) -> str:
        """Changes with whatever makes another Manager."""
        return digest_of(self.manager, self.broker, self.telemetry)

    @property
    def app_digest(self) -> str:
        """Changes with whatever makes another application."""
        fleet = {name: value for name, value in self.ray.model_dump().items() if name in _OF_THE_FLEET}
        return digest_of(self.router, self.broker, self.storage, self.webhooks, self.telemetry, more=fleet)

    @property
    def url(self) -> str:
        """Where the Router is reached from this machine."""
        return way_in_url(self.ray.host, self.ray.port)


def digest_of(*settings: RoleSettings, more: Mapping[str, object] | None = None) -> str:
    """A hash of every value, secrets included, and of our version."""

    def revealed(value: object) -> object:
        return value.get_secret_value() if isinstance(value, SecretStr) else repr(value)

    content = [__version__, {table.table: table.model_dump() for table in settings}, more or {}]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=revealed).encode()).hexdigest()


def way_in_url(host: str, port: int) -> str:
    """``http://host:port`` as this machine may call it."""
    return f"http://{_ANYWHERE.get(host, host)}:{port}"
