"""Our named actors in a cluster, as a process of it sees them. Everything here blocks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray

# The public ones ask the dashboard, which need not be reachable.
from ray._private.state import actors as actor_table
from ray._private.state import available_resources_per_node

from queue_schemas import RAY_NAMESPACE, CannotStart

REMOVAL_LIMIT_S = 10.0
_POLL_S = 0.1
_ENDED = "DEAD"
_RUNS = "ALIVE"


@dataclass(frozen=True, slots=True)
class Placed:
    """Where an actor runs: its node's address and id. Both are empty while it waits for a place."""

    node: str = ""
    node_id: str = ""
    pid: int = 0

    @property
    def runs(self) -> bool:
        return bool(self.node_id)


def actor_names(prefix: str) -> list[str]:
    """The names of our actors that begin so. A process may have another namespace: Serve's have."""
    found = ray.util.list_named_actors(all_namespaces=True)
    ours = (one["name"] for one in found if one["namespace"] == RAY_NAMESPACE)
    return sorted(name for name in ours if name.startswith(prefix))


def find_actor(name: str) -> Any | None:
    """The actor of ours with this name; None if there is none."""
    try:
        return ray.get_actor(name, RAY_NAMESPACE)
    except ValueError:
        return None


def placed_actors(prefix: str) -> dict[str, Placed]:
    """Where each actor runs whose name begins so, by name; Serve's replicas have names, too."""
    found = {}
    for facts in actor_table().values():
        if facts["Name"].startswith(prefix) and facts["State"] != _ENDED:
            place = facts["Address"]
            runs = facts["State"] == _RUNS
            found[facts["Name"]] = Placed(place["IPAddress"], place["NodeID"], facts["Pid"]) if runs else Placed()
    return found


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """A node that is alive: its address, and its resources by kind, all of them and those that nobody has."""

    address: str
    total: Mapping[str, float]
    free: Mapping[str, float]


def alive_nodes() -> list[NodeFacts]:
    """The cluster's nodes."""
    free: Mapping[str, Mapping[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return [NodeFacts(node["NodeManagerAddress"], node["Resources"], free.get(node["NodeID"], {})) for node in nodes]


def move_actor(name: str) -> None:
    """Have Ray start an actor anew, which it does where it may place one; the actor hands over first what it holds."""
    actor = find_actor(name)
    if actor is None:
        return
    with contextlib.suppress(ray.exceptions.RayError):  # what it holds lapses by itself
        ray.get(actor.stop.remote(), timeout=REMOVAL_LIMIT_S)
    ray.kill(actor, no_restart=False)


def until_removed(name: str) -> None:
    """Return once Ray has forgotten an actor that was killed: it keeps the name for a moment. Raises ``CannotStart``
    if that takes too long."""
    limit = time.monotonic() + REMOVAL_LIMIT_S
    while find_actor(name) is not None:
        if time.monotonic() > limit:
            raise CannotStart(f"the actor {name} did not end within {REMOVAL_LIMIT_S:.0f} s: try again")
        time.sleep(_POLL_S)
