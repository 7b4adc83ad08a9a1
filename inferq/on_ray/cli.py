"""``inferq ray``: the options of its commands. Their work is in :mod:`inferq.on_ray.commands`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from ..option_blocks import with_blocks
from ..options import DATA_DIR, AsJson, DataDir

ray_app = typer.Typer(
    help="Run inferq in a Ray cluster: the Manager as an actor, Routers as a Serve application, workers where there is "
    "room."
)


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Which cluster."""

    address: Annotated[
        str | None,
        typer.Option(
            envvar="INFERQ_RAY_ADDRESS", help="Ray cluster: host:port, or auto. Default: a cluster of its own."
        ),
    ] = None
    data_dir: DataDir = DATA_DIR

    @property
    def settings(self) -> dict[str, object]:
        return {"address": self.address, "data_dir": str(self.data_dir)}


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """Which workers Ray is to run."""

    model: Annotated[
        str | None, typer.Option(help="Model whose workers are meant. Without it, workers are left as they are.")
    ] = None
    workers: Annotated[
        int | None, typer.Option(min=0, help="Workers that always run. Default 1; 0 alone drains and removes them all.")
    ] = None
    max_workers: Annotated[
        int | None, typer.Option(min=1, help="Most workers, started and drained as the queue asks. Default: --workers.")
    ] = None
    cpus_per_worker: Annotated[float | None, typer.Option(min=0, help="CPUs kept for each worker. Default 1.")] = None
    gpus_per_worker: Annotated[float | None, typer.Option(min=0, help="GPUs kept for each worker. Default 0.")] = None
    advertise_url: Annotated[
        list[str] | None,
        typer.Option(help="Router URL for workers on other nodes; may be repeated. Default: from host and port."),
    ] = None

    @property
    def settings(self) -> dict[str, object]:
        return {**asdict(self), "advertise_url": ",".join(self.advertise_url) if self.advertise_url else None}


@ray_app.command("up")
@with_blocks
def ray_up(
    cluster: ClusterOptions,
    workers: WorkerOptions,
    worker_args: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="Further options of `inferq worker`.")
    ] = None,
    redis_url: Annotated[
        str | None,
        typer.Option(
            envvar="INFERQ_REDIS_URL", help="Redis or Valkey. Default: that of an `inferq up` on this machine."
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65_535, help="Port to listen on. Default 8000.")] = None,
    way_in: Annotated[
        str | None, typer.Option(help="Who listens: replica (the default), or serve for Serve's own proxy.")
    ] = None,
    min_replicas: Annotated[int | None, typer.Option(min=1, help="Minimum number of Routers. Default 2.")] = None,
    max_replicas: Annotated[int | None, typer.Option(min=1, help="Maximum number of Routers. Default 8.")] = None,
    dashboard_port: Annotated[
        int | None,
        typer.Option(min=0, max=65_535, help="Dashboard of a cluster of its own. Default 8265; 0: a free port."),
    ] = None,
    head_port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="Head of a cluster of its own. Default: a free port.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start inferq in Ray, or change it in place while it serves. All other settings: `inferq config ray`."""
    from .commands import ray_up as bring_up  # noqa: PLC0415

    asked = (
        cluster.settings
        | workers.settings
        | {
            "worker_args": worker_args or None,
            "host": host,
            "port": port,
            "way_in": way_in,
            "min_replicas": min_replicas,
            "max_replicas": max_replicas,
            "dashboard_port": dashboard_port,
            "head_port": head_port,
        }
    )
    raise typer.Exit(bring_up(asked, redis_url=redis_url, as_json=as_json))


@ray_app.command("status")
@with_blocks
def ray_status(cluster: ClusterOptions, as_json: AsJson = False) -> None:
    """Show what runs in Ray. Exit codes: 0 healthy, 1 not healthy, 2 no cluster answers."""
    from .commands import ray_status as show_status  # noqa: PLC0415

    raise typer.Exit(show_status(cluster.settings, as_json=as_json))


@ray_app.command("leave")
@with_blocks
def ray_leave(
    cluster: ClusterOptions, node: Annotated[str, typer.Option(help="Id of a node. Default: this machine's.")] = ""
) -> None:
    """Take a node out of the cluster: its workers drain, its Routers move. Exit code 1 if something is left on it."""
    from .commands import ray_leave as take_leave  # noqa: PLC0415

    raise typer.Exit(take_leave(cluster.settings, node=node))


@ray_app.command("down")
@with_blocks
def ray_down(cluster: ClusterOptions, as_json: AsJson = False) -> None:
    """Drain and stop inferq in Ray, workers first; also stops a cluster that `inferq ray up` started."""
    from .commands import ray_down as take_down  # noqa: PLC0415

    raise typer.Exit(take_down(cluster.settings, as_json=as_json))
