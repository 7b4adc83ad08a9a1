"""The workers in a cluster, as a driver of it brings them to a plan, sees them and takes them out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import ray

from inferq.autoscale.drivers.worker_command import id_prefix, pool_name, worker_mark
from inferq.autoscale.settings import AutoscaleSettings
from inferq.ray_cluster.actors import (
    NodeFacts,
    Placed,
    actor_names,
    alive_nodes,
    find_actor,
    placed_actors,
    until_removed,
)
from inferq.ray_cluster.workers import PREFIX as WORKER
from queue_schemas import CannotStart
from queue_schemas.addresses import is_loopback
from telemetry import get_logger

from .plan import RayPlan
from .pool_actor import PREFIX as POOL
from .pool_actor import STOP_LIMIT_S, PoolFacts, make_pool

FACTS_LIMIT_S = 5.0
PENDING, RUNNING, FOREIGN = "pending", "running", "foreign"
_POLL_S = 0.2
_MAX_NODES = 8

log = get_logger(__name__)

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker. ``state``: pending while no node has room for it; then as the autoscaler of its pool sees it
    (starting, ready, leaving, missing, lent), or running if none in the cluster does. ``outdated``: it was started with
    other settings than those of now, and is to be replaced. ``pid`` is that of its actor."""

    worker_id: str
    pool: str
    state: str
    outdated: bool
    place: Placed


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """The workers of one model. ``why_not`` says why they are not as they should be, ``failed`` what the last worker
    said that could not be kept running."""

    pool: str
    min: int
    max: int
    why_not: tuple[str, ...]
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Workers:
    """All of the cluster."""

    pools: tuple[PoolStatus, ...] = ()
    workers: tuple[WorkerStatus, ...] = ()

    @property
    def why_not(self) -> list[str]:
        """What keeps the pools from being as they should be."""
        return [reason for pool in self.pools for reason in pool.why_not]

    def settled(self, pool: str) -> bool:
        """Whether nothing is to be waited for: ``pool`` is as it should be, with no worker to be replaced, or one of
        its workers has failed."""
        own = [found for found in self.pools if found.pool == pool]
        replacing = any(worker.outdated for worker in self.workers if worker.pool == pool)
        return any(found.failed for found in own) or not (replacing or any(found.why_not for found in own))


def settle_pool(plan: RayPlan, tell: Tell) -> str:
    """Make the autoscaler of the plan's workers what it should be, which then starts, drains and replaces them; return
    what was done, empty if nothing. Pools of other models are left as they are. Raises ``CannotStart``."""
    name = plan.pool_name
    if not name:
        return ""
    head_host = str(ray.get_runtime_context().gcs_address).rpartition(":")[0]
    settings = plan.pool(head_host)
    if settings is None:
        return f"workers of {name} removed" if remove_workers(tell, name) else ""
    _refuse_loopback(settings, [node.address for node in alive_nodes()])
    digest, actor_name = plan.pool_digest(settings), POOL + pool_name(name)
    found = _ask(actor_name)
    if found is not None and found.digest == digest:
        return ""
    tell(f"the workers of {name}")
    _remove_pool(actor_name)
    actor = make_pool(settings, plan.telemetry, digest)
    try:
        ray.get(actor.facts.remote(), timeout=plan.ray.start_limit_ms / 1000)
    except ray.exceptions.RayError as error:
        _remove_pool(actor_name)
        said = next(iter(str(error).splitlines()), "")
        raise CannotStart(f"the autoscaler of the workers of {name} does not start: {said}") from error
    return _difference(found.settings if found is not None else None, settings)


def remove_workers(tell: Tell, pool: str = "") -> bool:
    """Drain the workers of ``pool`` and take them and their autoscaler out of the cluster; of all pools unless it is
    given. Whatever has not ended after ``stop_timeout`` is killed. False if there was nothing."""
    autoscalers = [POOL + pool_name(pool)] if pool else actor_names(POOL)
    removed = [name for name in autoscalers if _remove_pool(name)]
    places = placed_actors(WORKER + (f"{id_prefix(pool, 'ray')}-" if pool else ""))
    end_workers(places, tell)
    return bool(removed or places)


def end_workers(places: Mapping[str, Placed], tell: Tell) -> None:
    """Drain the workers of these actors, by name; kill those that have not ended after ``stop_timeout``."""
    if not places:
        return
    tell(f"{_counted(len(places), 'worker')}: {'it finishes' if len(places) == 1 else 'they finish'} what has begun")
    for name, place in places.items():
        actor = find_actor(name)
        if actor is not None and place.runs:
            actor.stop.remote()  # its answer does not come if it ends first
        elif actor is not None:
            ray.kill(actor, no_restart=True)
    limit = time.monotonic() + AutoscaleSettings.load().stop_timeout / 1000
    while (left := places.keys() & set(actor_names(WORKER))) and time.monotonic() < limit:
        time.sleep(_POLL_S)
    for name in left:
        log.warning("worker_killed", worker=name.removeprefix(WORKER))
        if (actor := find_actor(name)) is not None:
            ray.kill(actor, no_restart=True)


def read_workers() -> Workers:
    """All pools and workers of the cluster."""
    places = placed_actors(WORKER)
    pools, workers = [], []
    for name in actor_names(POOL):
        facts = _ask(name)
        if facts is None:
            pools.append(PoolStatus(name.removeprefix(POOL), 0, 0, ("the autoscaler of its workers does not answer",)))
            continue
        prefix = f"{WORKER}{id_prefix(facts.settings.pool, 'ray')}-"
        own = {name: places.pop(name) for name in list(places) if name.startswith(prefix)}
        seen = [_worker(name.removeprefix(WORKER), place, facts) for name, place in own.items()]
        workers += seen
        # Of its own workers those that are there now: the autoscaler may have looked before one went.
        states = {worker_id: state for worker_id, state in facts.states.items() if state == FOREIGN}
        states |= {worker.worker_id: worker.state for worker in seen}
        limits = facts.settings.min, facts.settings.max
        why_not = tuple(why_not_whole(facts, states))
        pools.append(PoolStatus(facts.settings.pool, *limits, why_not, facts.last_failure))
    workers += [
        WorkerStatus(name.removeprefix(WORKER), "", RUNNING if place.runs else PENDING, False, place)
        for name, place in places.items()
    ]
    return Workers(tuple(pools), tuple(workers))


def wait_settled(pool: str, limit_s: float) -> None:
    """Return once nothing of ``pool`` is to be waited for, or ``limit_s`` is over."""
    limit = time.monotonic() + limit_s
    while not read_workers().settled(pool) and time.monotonic() < limit:
        time.sleep(_POLL_S)


def why_not_whole(facts: PoolFacts, states: Mapping[str, str]) -> list[str]:
    """Why a pool has fewer workers than it should always have, or is not scaled. ``states``: of its workers, by id."""
    own = facts.settings
    reasons = [f"workers of {own.pool}: {reason}" for reason in facts.not_scaling]
    count = {state: list(states.values()).count(state) for state in states.values()}
    if count.get(PENDING):
        reasons.append(
            f"workers of {own.pool}: {count[PENDING]} wait{'s' * (count[PENDING] == 1)} for a place with "
            f"{_resources(own)} each; {_nodes()}"
        )
    serving = count.get("ready", 0) + count.get(FOREIGN, 0)
    if serving < own.min:
        others = "".join(
            f", {many} {state}" for state, many in sorted(count.items()) if state in ("starting", "missing")
        )
        reasons.append(f"workers of {own.pool}: {serving} of {own.min} serve{others}")
        if facts.last_failure and not any(facts.last_failure in reason for reason in reasons):
            reasons.append(f"workers of {own.pool}: the last that ended by itself said: {facts.last_failure}")
    return reasons


def _worker(worker_id: str, place: Placed, facts: PoolFacts) -> WorkerStatus:
    state = facts.states.get(worker_id, "starting") if place.runs else PENDING
    return WorkerStatus(worker_id, facts.settings.pool, state, worker_id in facts.outdated, place)


def _ask(name: str) -> PoolFacts | None:
    actor = find_actor(name)
    if actor is None:
        return None
    try:
        facts: PoolFacts = ray.get(actor.facts.remote(), timeout=FACTS_LIMIT_S)
    except ray.exceptions.RayError as error:
        log.info("pool_does_not_answer", actor=name, error=str(error))
        return None
    return facts


def _remove_pool(name: str) -> bool:
    """End an autoscaler; its workers run on. False if there was none."""
    actor = find_actor(name)
    if actor is None:
        return False
    try:
        ray.get(actor.stop.remote(), timeout=2 * STOP_LIMIT_S)
    except ray.exceptions.RayError as error:
        log.warning("pool_not_stopped", actor=name, error=str(error), then="its claim lapses by itself")
    ray.kill(actor, no_restart=True)
    until_removed(name)
    return True


def _refuse_loopback(settings: AutoscaleSettings, addresses: list[str]) -> None:
    """Raise ``CannotStart`` if workers on other machines could not reach the Router."""
    if len(set(addresses)) > 1 and all(is_loopback(urlsplit(url).hostname or "") for url in settings.manager_urls):
        raise CannotStart(
            f"workers on other nodes cannot reach the Router at {settings.manager_urls[0]}: let it listen on an "
            "address that they reach (--host), or give --advertise-url"
        )


def _difference(before: AutoscaleSettings | None, now: AutoscaleSettings) -> str:
    size = str(now.min) if now.min == now.max else f"{now.min} to {now.max}"
    if before is None:
        return f"workers of {now.pool}: {size}"
    replaced = worker_mark(before) != worker_mark(now)
    return f"workers of {now.pool}: {size}" + (", replaced one by one" if replaced else "")


def _resources(settings: AutoscaleSettings) -> str:
    return f"{_counted(settings.ray_cpus, 'CPU')} and {_counted(settings.ray_gpus, 'GPU')}"


def _nodes() -> str:
    """What the nodes have, for a sentence."""
    nodes = alive_nodes()

    def has(node: NodeFacts, kind: str) -> str:
        return f"{node.free.get(kind, 0.0):g} of {_counted(node.total.get(kind, 0.0), kind)}"

    facts = [f"{node.address} {has(node, 'CPU')} and {has(node, 'GPU')}" for node in nodes[:_MAX_NODES]]
    more = f", and {len(nodes) - _MAX_NODES} more" if len(nodes) > _MAX_NODES else ""
    return f"free on the nodes: {', '.join(facts)}{more}"


def _counted(count: float, thing: str) -> str:
    return f"{count:g} {thing}{'' if count == 1 else 's'}"
