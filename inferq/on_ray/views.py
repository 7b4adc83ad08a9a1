"""What `inferq ray` prints: for people in rows, for scripts as facts."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.markup import escape

from inferq.console import out
from inferq.on_ray.plan import RayPlan
from inferq.ray_cluster.head import Head
from inferq.ray_cluster.settings import RaySettings
from telemetry import redact_url

if TYPE_CHECKING:
    from inferq.on_ray.pools import Workers, WorkerStatus
    from inferq.on_ray.status import ClusterStatus


def status_facts(status: ClusterStatus, head: Head | None) -> dict[str, object]:
    """For scripts."""
    manager = status.manager
    return {
        "address": status.address,
        "own": head is not None,
        "dashboard": head.dashboard_url if head is not None else "",
        "pid": head.pid if head is not None else 0,
        "url": status.url,
        "way_in": status.way_in,
        "healthy": status.healthy,
        "ready": not status.not_ready,
        "not_ready": list(status.not_ready),
        "manager": None
        if manager is None
        else {
            "pid": manager.pid,
            "acting": manager.acting,
            "standing_by": manager.blocked_by_other_manager,
            "not_ready": list(manager.why_not),
        },
        "application": None if status.application is None else asdict(status.application),
        "pools": [asdict(pool) for pool in status.workers.pools],
        "workers": [asdict(worker) for worker in status.workers.workers],
    }


def print_up(status: ClusterStatus, head: Head | None, plan: RayPlan, changed: list[str]) -> None:
    """What `inferq ray up` has done, what runs, and what to do next."""
    done = "; ".join(changed) if changed else "everything runs as configured: nothing changed"
    out.print(f"\n[bold green]inferq is up in Ray[/bold green]: {escape(done)}\n")
    print_rows(status, head)
    out.print(f"  [bold]{'Queue':<11}[/bold]{escape(redact_url(plan.broker.redis_url))}")
    for reason in troubles(status):
        out.print(f"\n[yellow]Not ready yet:[/yellow] {escape(reason)}")
    if troubles(status):
        out.print("It gets ready by itself once that is fixed; see `inferq ray status`.")
    if not status.workers.workers:
        out.print(f"\nWorkers:  inferq worker --manager-url {status.url} ...", markup=False)
    where = f" --address {status.address}" if head is None else ""
    if plan.ray.data_dir != RaySettings.model_fields["data_dir"].default:
        where += f" --data-dir {plan.ray.data_dir}"
    out.print(f"Look:     inferq ray status{where}", markup=False)
    out.print(f"Stop:     inferq ray down{where}\n", markup=False)


def print_rows(status: ClusterStatus, head: Head | None) -> None:
    """What runs."""
    rows = [("Ray", f"{status.address}  ({'our own' if head is not None else 'joined'})")]
    if head is not None:
        rows.append(("Dashboard", f"{head.dashboard_url}  (its token is in {head.token_file})"))
    if status.manager is None:
        rows.append(("Manager", "none"))
    else:
        beside = "standing by: another Manager acts" if status.manager.blocked_by_other_manager else "not acting"
        acting = "acting" if status.manager.acting else beside
        rows.append(("Manager", f"process {status.manager.pid}, {acting}"))
    if status.application is None:
        rows.append(("Router", "none"))
    else:
        replicas = ", ".join(f"{count} {state.lower()}" for state, count in status.application.replicas.items())
        rows.append(("Router", f"{status.url}/v1  ({replicas or status.application.state.lower()})"))
        rows.append(("Way in", "the replicas themselves" if status.way_in == "replica" else "Serve's proxy"))
    rows += _worker_rows(status.workers)
    for name, text in rows:
        out.print(f"  [bold]{name:<11}[/bold]{escape(text)}")


def troubles(status: ClusterStatus) -> list[str]:
    """Why all is not well, in sentences."""
    reasons = list(status.not_ready)
    if status.manager is None:
        reasons.append("there is no Manager")
    else:
        reasons += [f"Manager: {reason}" for reason in status.manager.why_not if reason not in reasons]
    if status.application is not None and not status.application.runs:
        reasons.append(f"the Serve application is {status.application.state}: {status.application.message}")
    return reasons + status.workers.why_not


def _worker_rows(found: Workers) -> list[tuple[str, str]]:
    """One row for each pool, and one for each worker below it; those that no autoscaler in the cluster runs come
    last."""
    rows = []
    for pool in found.pools:
        own = [worker for worker in found.workers if worker.pool == pool.pool]
        size = str(pool.min) if pool.min == pool.max else f"{pool.min} to {pool.max}, by its queue"
        rows.append(("Workers", f"{pool.pool}  ({size})"))
        rows += [("", _worker_line(worker)) for worker in own]
    others = [worker for worker in found.workers if not worker.pool]
    if others:
        rows.append(("Workers", "of autoscalers outside the cluster"))
        rows += [("", _worker_line(worker)) for worker in others]
    return rows


def _worker_line(worker: WorkerStatus) -> str:
    place = f"{worker.place.node}, node {worker.place.node_id[:8]}" if worker.place.runs else "no place yet"
    return f"{worker.worker_id}  {worker.state}{', to be replaced' if worker.outdated else ''}  ({place})"
