"""Bringing a cluster to what a plan says, and out of it again. Every step may be repeated."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import ray
from ray import serve
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]  # generated
from ray.serve import RunTarget

from inferq.autoscale.settings import AutoscaleSettings
from inferq.ray_cluster.actors import Placed, move_actor, placed_actors, until_removed
from inferq.ray_cluster.workers import PREFIX as WORKER
from manager.ray_actor import ensure_manager, remove_manager
from queue_schemas import RAY_MANAGER, CannotStart
from router.ray_serve import Scale, application

from .plan import RayPlan
from .pool_actor import PREFIX as POOL
from .pools import end_workers, remove_workers, settle_pool
from .status import APPLICATION, forget_note, read_application, read_manager, read_note, write_note

_POLL_S = 0.2
_REPLICA = f"SERVE_REPLICA::{APPLICATION}#"
_NODE_GOES = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
_NO_DEADLINE = 0
_REFUSAL = re.compile(r"(?:CannotStart|BrokerUnsuitable)(?:\(['\"]|: )(.+?)(?:['\"]\))?\s*$", re.MULTILINE)

Tell = Callable[[str], None]


def deploy(plan: RayPlan, tell: Tell) -> list[str]:
    """Make the Manager, the application and the workers what ``plan`` says; what was changed, in words.

    Raises ``CannotStart`` with the reason why a part cannot be had. What runs already is replaced while it serves.
    """
    if not plan.broker.redis_url:
        raise CannotStart("the Manager and the Routers must be told where Redis is: give --redis-url")
    changed = [settle_manager(plan, tell), _settle_application(plan, tell), settle_pool(plan, tell)]
    return [change for change in changed if change]


def remove(tell: Tell) -> bool:
    """Take workers, application and Manager out of the cluster, in this order, and Serve too if nothing else is in it.

    False if there was nothing of ours. Workers drain; requests that run get the time that the Router's settings give
    them.
    """
    had_workers = remove_workers(tell)
    status = serve.status()
    ours = APPLICATION in status.applications
    if ours:
        tell("the Router: it finishes what it has begun")
        serve.delete(APPLICATION)
    if ours and not set(status.applications) - {APPLICATION}:
        tell("Serve")
        serve.shutdown()  # type: ignore[no-untyped-call]
    tell("the Manager")
    had_manager = remove_manager()
    if had_manager:
        until_removed(RAY_MANAGER)
    forget_note()
    return ours or had_manager or had_workers


def leave(node_id: str, tell: Tell) -> bool:
    """Take a node out of the cluster, this one unless its id is given: Ray places nothing more on it, its workers
    drain, Serve starts other Routers for those that it has, and Manager and autoscalers start elsewhere.

    Whether nothing of ours is left on it: within ``stop_timeout``, no other node may have had room for its Routers.
    Raises ``CannotStart`` if the cluster refuses.
    """
    context = ray.get_runtime_context()
    node_id = node_id or context.get_node_id()
    limit = time.monotonic() + AutoscaleSettings.load().stop_timeout / 1000
    accepted, refusal = GcsClient(address=context.gcs_address).drain_node(
        node_id, _NODE_GOES, "inferq ray leave", _NO_DEADLINE
    )
    if not accepted:
        raise CannotStart(f"the Ray cluster does not let node {node_id[:8]} go: {refusal}")

    def left(prefix: str) -> dict[str, Placed]:
        return {name: place for name, place in placed_actors(prefix).items() if place.node_id == node_id}

    end_workers(left(WORKER), tell)
    for prefix in (POOL, RAY_MANAGER):
        for name in left(prefix):
            tell(f"{name}: it starts on another node")
            move_actor(name)
    while (routers := left(_REPLICA)) and time.monotonic() < limit:
        time.sleep(_POLL_S)
    return not routers


def make_application(plan: RayPlan) -> serve.Application:
    """The Serve application of ``plan``."""
    own = plan.ray
    scale = Scale(
        min_replicas=own.min_replicas,
        max_replicas=own.max_replicas,
        target_open_requests=own.target_open_requests,
        up_delay_s=own.up_delay_ms / 1000,
        down_delay_s=own.down_delay_ms / 1000,
        cpus=own.replica_cpus,
    )
    return application(
        plan.router, plan.broker, plan.storage, plan.webhooks, plan.telemetry, way_in=own.way_in, scale=scale
    )


def settle_manager(plan: RayPlan, tell: Tell) -> str:
    """Start the plan's Manager unless it runs; return what was done, empty if nothing."""
    digest = plan.manager_digest
    found = read_manager()
    if found is not None and found.digest == digest:
        return ""
    tell("the Manager")
    if found is not None:
        remove_manager()
        until_removed(RAY_MANAGER)
    actor = ensure_manager(plan.manager, plan.broker, plan.telemetry, digest)
    try:
        ray.get(actor.facts.remote(), timeout=plan.ray.start_limit_ms / 1000)
    except ray.exceptions.RayError as error:
        remove_manager()
        raise CannotStart(f"the Manager's actor does not start: {_last_line(str(error))}") from error
    return "Manager started" if found is None else "Manager replaced"


def _settle_application(plan: RayPlan, tell: Tell) -> str:
    found, note = read_application(), read_note()
    if found is not None and found.runs and note is not None and note.digest == plan.app_digest:
        return ""
    if found is not None and note is not None and note.from_file:
        raise CannotStart(
            "the Routers come from a Serve config file, to which Serve would go back when its controller restarts: "
            "change that file and `serve deploy` it, or run `inferq ray down` first"
        )
    proxied = plan.ray.way_in == "serve"
    if found is not None and note is not None and proxied != (note.way_in == "serve"):
        raise CannotStart("another way in needs another Serve: run `inferq ray down` first, and move the clients over")
    if proxied and found is not None and note is not None and (note.host, note.port) != (plan.ray.host, plan.ray.port):
        raise CannotStart(f"Serve's proxy listens at {note.url} until Serve ends: run `inferq ray down` first")
    tell("the Router")
    if proxied:
        serve.start(proxy_location="EveryNode", http_options={"host": plan.ray.host, "port": plan.ray.port})
    else:
        serve.start(proxy_location="Disabled")
    target = RunTarget(make_application(plan), name=APPLICATION, route_prefix="/")
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    try:
        _await_replicas(plan.ray.start_limit_ms / 1000)
    except BaseException:
        if found is None:
            serve.delete(APPLICATION)  # or Serve would go on trying
        raise
    write_note(plan)
    return "Router started" if found is None else "Router replaced, one replica after the other"


def _await_replicas(limit_s: float) -> None:
    """Return once the application runs as it was asked for. Raises ``CannotStart`` with a replica's own words."""
    limit = time.monotonic() + limit_s
    while True:
        found = read_application()
        if found is not None and found.runs:
            return
        message = found.message if found else ""
        refusal = _REFUSAL.findall(message)
        if refusal:
            raise CannotStart(refusal[-1])
        if found is not None and found.state == "DEPLOY_FAILED":
            raise CannotStart(f"the Router's replicas do not start: {_last_line(message)}")
        if time.monotonic() > limit:
            why = f": {_last_line(message)}" if message else "; look at the dashboard"
            raise CannotStart(f"the Router's replicas did not start within {limit_s:.0f} s{why}")
        time.sleep(_POLL_S)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
