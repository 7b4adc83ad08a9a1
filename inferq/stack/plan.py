"""Which processes make up a stack, and how each is called."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from batches import BatchSettings
from manager.settings import ManagerSettings
from queue_schemas import CannotStart
from router.settings import RouterSettings
from storage import StorageSettings
from telemetry.files import absolute_path
from webhooks.settings import NotifierSettings
from worker.settings import WorkerSettings

EngineChoice = Literal["vllm", "url", "sim"]
MAX_WORKERS = 64
READY_LIMIT_S = 60.0
"""Longest start of a role, its engine aside."""
_MARGIN_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StackOptions:
    """The options of `inferq up`. None: as the role's own settings say (environment, ``inferq.toml``, default)."""

    engine: EngineChoice
    engine_url: str | None = None
    model: str | None = None
    served_model_name: str | None = None
    vllm_command: str | None = None
    vllm_device: Literal["auto", "cpu", "gpu"] | None = None
    vllm_args: tuple[str, ...] = ()
    engine_threads: int | None = None
    """Threads of each engine on a CPU."""
    workers: int = 1
    slots: int | None = None
    router_port: int | None = None
    manager_port: int | None = None
    worker_port: int | None = None
    data_dir: Path = Path(".inferq")
    batcher: bool = True
    """Whether batches are run, and webhooks sent, too: that needs a Redis that RQ can use."""


@dataclass(frozen=True, slots=True)
class RoleSpec:
    """One process. ``url`` is where it answers /healthz and /readyz, ``port_flag`` what to change if its port is taken.

    ``ready_limit_s`` bounds its first start; ``stop_limit_s`` the time from SIGTERM to its end: what it promises its
    clients, and a margin.
    """

    name: str
    module: str
    flags: tuple[str, ...]
    host: str
    port: int
    port_flag: str
    ready_limit_s: float
    stop_limit_s: float
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to ours, where not set there already."""
    may_leave: bool = False
    """Whether exit code 0 means that somebody ordered it to leave, and that it is to stay away."""

    @property
    def url(self) -> str:
        return f"http://{_reachable(self.host)}:{self.port}"

    @property
    def command(self) -> tuple[str, ...]:
        return (sys.executable, "-m", self.module, *self.flags)


@dataclass(frozen=True, slots=True)
class StackPlan:
    """The processes, in the order in which they are started.

    ``services`` work by themselves on what Routers put into the file store: the batcher, the notifier.
    """

    manager: RoleSpec
    router: RoleSpec
    services: tuple[RoleSpec, ...]
    workers: tuple[RoleSpec, ...]
    data_dir: Path

    @property
    def roles(self) -> tuple[RoleSpec, ...]:
        return (self.manager, self.router, *self.services, *self.workers)


def choose_engine(engine: str | None, engine_url: str | None) -> EngineChoice:
    """The engine to run; a URL implies the engine ``url``. Raises ``CannotStart`` for an unknown one."""
    match engine or "auto":
        case "auto":
            return "url" if engine_url else "vllm"
        case "vllm" | "url" | "sim" as known:
            if engine_url and known != "url":
                raise CannotStart(
                    f"--engine-url names a server that runs already, --engine {known} starts another: give one of them"
                )
            return known
        case unknown:
            advice = (
                f"give --engine-url {unknown}" if "://" in unknown else "choose vllm, sim, or url with --engine-url"
            )
            raise CannotStart(f"--engine {unknown} is not an engine: {advice}")


def plan_stack(options: StackOptions, free_port: Callable[[], int]) -> StackPlan:
    """The stack that ``options`` ask for; ``free_port`` stands in for each port 0.

    Raises ``CannotStart`` if they contradict each other or the settings.
    """
    if not 0 <= options.workers <= MAX_WORKERS:
        raise CannotStart(f"--workers {options.workers}: up to {MAX_WORKERS} run under one `inferq up`")
    data_dir = absolute_path(options.data_dir)
    manager = _manager(options, data_dir, free_port)
    router = _router(options, data_dir, manager, free_port)
    workers = tuple(_workers(options, data_dir, manager, router, free_port))
    services = _services(data_dir, free_port) if options.batcher else ()
    plan = StackPlan(manager, router, services, workers, data_dir)
    _refuse_shared_ports(plan)
    return plan


def _manager(options: StackOptions, data_dir: Path, free_port: Callable[[], int]) -> RoleSpec:
    settings = ManagerSettings.load(port=options.manager_port)
    port = settings.port or free_port()
    return RoleSpec(
        name="manager",
        module="manager.service",
        flags=("--port", str(port), "--data-dir", str(data_dir)),
        host=settings.host,
        port=port,
        port_flag="--manager-port",
        ready_limit_s=READY_LIMIT_S,
        stop_limit_s=settings.shutdown_timeout_ms / 1000 + _MARGIN_S,
    )


def _router(options: StackOptions, data_dir: Path, manager: RoleSpec, free_port: Callable[[], int]) -> RoleSpec:
    settings = RouterSettings.load(port=options.router_port)
    port = settings.port or free_port()
    return RoleSpec(
        name="router",
        module="router.service",
        flags=("--port", str(port), "--manager-url", manager.url, *store_flags(data_dir)),
        host=settings.host,
        port=port,
        port_flag="--router-port",
        ready_limit_s=READY_LIMIT_S,
        stop_limit_s=settings.shutdown_timeout_ms / 1000 + _MARGIN_S,
    )


def _services(data_dir: Path, free_port: Callable[[], int]) -> tuple[RoleSpec, ...]:
    batches, webhooks = BatchSettings.load(), NotifierSettings.load()
    return (
        _service("batcher", "batches.service", batches, batches.shutdown_timeout_ms, data_dir, free_port),
        _service("notifier", "webhooks.service", webhooks, webhooks.attempt_timeout_ms, data_dir, free_port),
    )


def _service(
    name: str,
    module: str,
    settings: BatchSettings | NotifierSettings,
    last_step_ms: int,
    data_dir: Path,
    free_port: Callable[[], int],
) -> RoleSpec:
    # Only operators use it: a free port, unless one is set.
    port = (settings.port if "port" in settings.model_fields_set else 0) or free_port()
    return RoleSpec(
        name=name,
        module=module,
        flags=("--port", str(port), *store_flags(data_dir)),
        host=settings.host,
        port=port,
        port_flag=settings.variable("port"),
        ready_limit_s=READY_LIMIT_S,
        stop_limit_s=last_step_ms / 1000 + 2 * _MARGIN_S,
    )


def store_flags(data_dir: Path) -> tuple[str, ...]:
    """Where files and batches lie, for every role that asks: in the data folder, unless settings say otherwise."""
    return () if "url" in StorageSettings.load().model_fields_set else ("--storage-url", store_url(data_dir))


def store_url(data_dir: Path) -> str:
    """Where that is."""
    settings = StorageSettings.load()
    return settings.url if "url" in settings.model_fields_set else str(data_dir / "store")


def _workers(
    options: StackOptions, data_dir: Path, manager: RoleSpec, router: RoleSpec, free_port: Callable[[], int]
) -> list[RoleSpec]:
    settings = WorkerSettings.load(
        port=options.worker_port,
        engine=options.engine,
        engine_url=options.engine_url,
        model=options.model,
        slots=options.slots,
    )
    # The Manager first: it ends after the workers, so that they can say goodbye.
    flags = ["--manager-url", manager.url, "--manager-url", router.url, "--engine", options.engine]
    flags += ["--slots", str(settings.slots), "--engine-log-dir", str(data_dir / "logs")]
    given = {
        "--engine-url": options.engine_url,
        "--model": options.model,
        "--served-model-name": options.served_model_name,
        "--vllm-command": options.vllm_command,
        "--vllm-device": options.vllm_device,
    }
    flags += [part for flag, value in given.items() if value for part in (flag, value)]
    if options.vllm_args:
        flags.append(f"--vllm-args={shlex.join(options.vllm_args)}")
    return [
        RoleSpec(
            name=f"worker-{number}",
            module="worker.service",
            flags=("--worker-id", f"worker-{number}", "--port", str(port), *flags),
            host=settings.host,
            port=port,
            port_flag="--worker-port",
            ready_limit_s=settings.engine_ready_timeout_ms / 1000 + READY_LIMIT_S,
            environment={"OMP_NUM_THREADS": str(options.engine_threads)} if options.engine_threads else {},
            may_leave=True,
            stop_limit_s=(settings.drain_timeout_ms + settings.engine_stop_timeout_ms) / 1000 + _MARGIN_S,
        )
        for number in range(1, options.workers + 1)
        for port in (settings.port + number - 1 if settings.port else free_port(),)
    ]


def _refuse_shared_ports(plan: StackPlan) -> None:
    taken: dict[int, RoleSpec] = {}
    for role in plan.roles:
        other = taken.setdefault(role.port, role)
        if other is not role:
            raise CannotStart(
                f"port {role.port} is set for both {other.name} and {role.name}: "
                f"choose others with {other.port_flag} or {role.port_flag}"
            )


def _reachable(host: str) -> str:
    """Where a process of this machine reaches one that listens on ``host``."""
    if host in {"0.0.0.0", "::", ""}:  # noqa: S104 - compared, not bound
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
