"""Bringing a cluster to what a plan says, and out of it again. Every step may be repeated."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import ray
from ray import serve
from ray.serve import RunTarget

from manager.ray_actor import ensure_manager, find_manager, remove_manager
from queue_schemas import CannotStart
from router.ray_serve import Scale, application

from .plan import RayPlan
from .status import APPLICATION, forget_note, read_application, read_manager, read_note, write_note

REMOVAL_LIMIT_S = 10.0
_POLL_S = 0.2
_REFUSAL = re.compile(r"(?:CannotStart|BrokerUnsuitable)(?:\(['\"]|: )(.+?)(?:['\"]\))?\s*$", re.MULTILINE)

Tell = Callable[[str], None]


def deploy(plan: RayPlan, tell: Tell) -> list[str]:
    """Make the Manager and the application what ``plan`` says; what was changed, in words.

    Raises ``CannotStart`` with the reason why a part cannot be had. What runs already is replaced while it serves.
    """
    if not plan.broker.redis_url:
        raise CannotStart("the Manager and the Routers must be told where Redis is: give --redis-url")
    changed = [settle_manager(plan, tell), _settle_application(plan, tell)]
    return [change for change in changed if change]


def remove(tell: Tell) -> bool:
    """Take application and Manager out of the cluster, and Serve too if nothing else is in it.

    False if there was nothing of ours. Requests that run get the time that the Router's settings give them.
    """
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
        _until_no_manager()
    forget_note()
    return ours or had_manager


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
        _until_no_manager()
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


def _until_no_manager() -> None:
    """Ray keeps the name for a moment."""
    limit = time.monotonic() + REMOVAL_LIMIT_S
    while find_manager() is not None:
        if time.monotonic() > limit:
            raise CannotStart(f"the Manager's actor did not end within {REMOVAL_LIMIT_S:.0f} s: try again")
        time.sleep(_POLL_S)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
