"""``inferq ray up | status | down``: the fabric in a Ray cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from rich.markup import escape

from inferq.console import err, out, print_json
from inferq.on_ray.plan import RayPlan
from inferq.on_ray.views import print_rows, print_up, status_facts, troubles
from inferq.ray_cluster.cluster import Target, connected, find_target, require_ray
from inferq.ray_cluster.head import Head, locked, read_head, start_head, stop_head
from inferq.ray_cluster.settings import RaySettings
from queue_schemas import CannotStart
from telemetry.http.server import bind_socket

HEALTHY, UNHEALTHY, NO_CLUSTER = 0, 1, 2


def ray_up(asked: Mapping[str, object], *, redis_url: str | None, as_json: bool) -> int:
    """Start or change inferq in a cluster; the exit code. Raises ``CannotStart`` with the reason if it cannot."""
    require_ray()
    settings = RaySettings.load(**asked)
    folder = settings.data_folder
    plan = _plan_with_queue(settings, redis_url)
    plan.pool(settings.host)  # raises now what would be refused at the end
    with locked(folder):
        target, started = _find_or_start(settings)
        try:
            with connected(target, settings.connect_limit_ms / 1000) as address:
                from inferq.on_ray.deploy import deploy  # noqa: PLC0415 - loads Ray
                from inferq.on_ray.pools import wait_settled  # noqa: PLC0415
                from inferq.on_ray.status import read_status, wait_ready  # noqa: PLC0415

                changed = deploy(plan, _tell)
                _tell("waiting until the Router is ready")
                wait_ready(plan.url, settings.ready_limit_ms / 1000)
                if settings.model:
                    _tell("waiting until the workers are ready")
                    wait_settled(plan.pool_name, settings.ready_limit_ms / 1000)
                status = read_status(address)
        except BaseException:
            if started is not None:
                stop_head(started, folder)
            raise
    changed = ["Ray started", *changed] if started is not None else changed
    if as_json:
        print_json({**status_facts(status, target.head), "changed": changed}, line=True)
    else:
        print_up(status, target.head, plan, changed)
    return HEALTHY


def ray_status(asked: Mapping[str, object], *, as_json: bool) -> int:
    """Say what runs; the exit code: 0 all is well, 1 it is not, 2 there is no cluster."""
    settings = RaySettings.load(**asked)
    target = find_target(settings)
    if target is None:
        raise CannotStart("no Ray cluster of ours runs: start it with `inferq ray up`, or name one with --address")
    with connected(target, settings.connect_limit_ms / 1000) as address:
        from inferq.on_ray.status import read_status  # noqa: PLC0415 - loads Ray

        status = read_status(address)
    if as_json:
        print_json(status_facts(status, target.head))
    else:
        print_rows(status, target.head)
        for reason in troubles(status):
            out.print(f"[yellow]not ready:[/yellow] {escape(reason)}")
    return HEALTHY if status.healthy else UNHEALTHY


def ray_down(asked: Mapping[str, object], *, as_json: bool) -> int:
    """Take the fabric out of the cluster, and end the cluster if it is our own; the exit code."""
    settings = RaySettings.load(**asked)
    folder = settings.data_folder
    with locked(folder):
        target = find_target(settings)
        removed = False
        try:
            if target is not None:
                with connected(target, settings.connect_limit_ms / 1000):
                    from inferq.on_ray.deploy import remove  # noqa: PLC0415 - loads Ray

                    removed = remove(lambda step: err.print(f"stopping {escape(step)}"))
        except CannotStart as error:
            if target is None or target.head is None:
                raise
            err.print(f"[yellow]not drained:[/yellow] {escape(error.message)}")
        finally:
            # Whatever keeps the fabric from a good end: a cluster of our own ends with this command.
            own = target.head if target is not None else _left_over(settings)
            if own is not None:
                err.print("stopping Ray")
                stop_head(own, folder)
    if as_json:
        print_json({"removed": removed, "stopped": own is not None}, line=True)
    elif removed or own is not None:
        out.print("The fabric is out of Ray." + (" Ray has ended." if own is not None else " The cluster runs on."))
    else:
        out.print("Nothing of ours runs.")
    return HEALTHY


def ray_leave(asked: Mapping[str, object], *, node: str) -> int:
    """Take one node out of the cluster; the exit code: 0 nothing of ours is left on it, 1 something is."""
    settings = RaySettings.load(**asked)
    target = find_target(settings)
    if target is None:
        raise CannotStart("no Ray cluster of ours runs here: name one with --address")
    with connected(target, settings.connect_limit_ms / 1000):
        from inferq.on_ray.deploy import leave  # noqa: PLC0415 - loads Ray

        empty = leave(node, lambda step: err.print(escape(step)))
    out.print("The node can go." if empty else "Some Routers are still on it: no other node has taken them in time.")
    return HEALTHY if empty else UNHEALTHY


def _find_or_start(settings: RaySettings) -> tuple[Target, Head | None]:
    """The cluster to work on, and its head if it was started for that."""
    target = find_target(settings)
    if target is not None:
        return target, None
    bind_socket(settings.host, settings.port).close()  # replicas would say the same, after the start of a head
    _tell("Ray")
    head = start_head(settings)
    return Target(head.address, head), head


def _left_over(settings: RaySettings) -> Head | None:
    """A head of ours that has died, or never came up, and may have left processes."""
    return None if settings.address else read_head(settings.data_folder)


def _plan_with_queue(settings: RaySettings, redis_url: str | None) -> RayPlan:
    """The plan; without a Redis given, on the embedded queue of an `inferq up` that runs with the same data."""
    plan = RayPlan.load(settings, redis_url=redis_url)
    if plan.broker.redis_url or settings.address:
        return plan
    from broker.embedded.server import running_url  # noqa: PLC0415 - needs a POSIX system

    found = asyncio.run(running_url(settings.data_folder / "valkey"))
    if not found:
        raise CannotStart(
            "give --redis-url (or INFERQ_REDIS_URL): Routers in Ray need a Redis or Valkey that outlives them. "
            f"An `inferq up` that runs with the data folder {settings.data_folder} would have lent its own"
        )
    return RayPlan.load(settings, redis_url=found)


def _tell(step: str) -> None:
    err.print(escape(step if step.startswith("waiting") else f"starting {step}"))
