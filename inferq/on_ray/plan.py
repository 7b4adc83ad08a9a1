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
from inferq.autoscale.settings import AutoscaleSettings
from inferq.ray_cluster.settings import RaySettings
from manager.settings import ManagerSettings
from queue_schemas import RAY_MANAGER, CannotStart
from router.settings import RouterSettings
from storage import StorageSettings
from telemetry import RoleSettings, TelemetrySettings
from webhooks.settings import WebhookSettings
from worker.service import read_settings as read_worker_settings
from worker.settings import WorkerSettings

_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - addresses to be replaced
_OF_THE_FLEET = frozenset(
    {
        *("host", "port", "way_in", "min_replicas", "max_replicas", "target_open_requests"),
        *("up_delay_ms", "down_delay_ms", "replica_cpus"),
    }
)
"""The settings of table ``[ray]`` that make the application what it is."""
_SECRET_FLAGS = {
    WorkerSettings.flag(name): WorkerSettings.variable(name)
    for name, field in WorkerSettings.model_fields.items()
    if "Secret" in str(field.annotation)
}


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
    def pool_name(self) -> str:
        """The model whose workers are meant, as clients name it; empty if none is. Raises ``CannotStart`` if `inferq
        worker` would refuse its options."""
        return next(iter(_worker_settings(self.ray).installed)) if self.ray.model else ""

    def pool(self, head_host: str) -> AutoscaleSettings | None:
        """What the autoscaler of the workers is told; None if none are to run. ``head_host`` is the address of the
        cluster's head, at which workers find a Router that listens on every address."""
        own = self.ray
        most = own.max_workers or own.workers
        if not own.model or not most:
            return None
        return AutoscaleSettings.load(
            pool=self.pool_name,
            min=own.workers,
            max=most,
            driver="ray",
            args=["--model", own.model, *own.worker_args],
            manager_urls=own.advertise_urls or [_url(own.host, own.port, own.node_host or head_host)],
            ray_cpus=own.cpus_per_worker,
            ray_gpus=own.gpus_per_worker,
        )

    def pool_digest(self, pool: AutoscaleSettings) -> str:
        """Changes with whatever makes another autoscaler."""
        return digest_of(pool, self.telemetry)

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
    return _url(host, port, _ANYWHERE.get(host, host))


def _url(host: str, port: int, instead: str) -> str:
    """The URL of who listens at ``host``, called ``instead`` if it stands for all addresses."""
    return f"http://{instead if host in _ANYWHERE else host}:{port}"


def _worker_settings(ray: RaySettings) -> WorkerSettings:
    """The settings of a worker of ``ray``'s model, as far as they are known here."""
    if given := {part.split("=")[0] for part in ray.worker_args} & set(_SECRET_FLAGS):
        flag = min(given)
        raise CannotStart(f"{flag} would show in process lists: set {_SECRET_FLAGS[flag]} in the nodes' environment")
    try:
        settings, _ = read_worker_settings(["--model", ray.model, *ray.worker_args])
    except SystemExit as usage:
        raise CannotStart("`inferq worker` has no such option: see `inferq worker --help`") from usage
    return settings
