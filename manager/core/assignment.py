"""Decide which queues a worker claims from, and say which model and adapters it loads.

Rules:

* A ready, active worker pulls every lane of every model it serves, on the shard of the model's pool.
* A worker whose engine is not ready, or which is unresponsive, is given nothing new; what it has stays, as far as it
  still serves it, so that a short trouble moves no queue.
* A draining worker pulls nothing, nor does one that is told to load another model, until it serves that.
* An adapter that a worker is to unload is not pulled; one that it is to load is, once its engine lists it.
* ``(term, version)`` orders assignments. The version rises exactly when the content changes; the term is that of the
  Manager that answers, so that a deposed Manager's assignment never wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from queue_schemas import Assignment, EngineState, PoolAssignment, WorkerState
from queue_schemas.fleet.messages import MAX_VERSION


def wanted_pools(
    state: WorkerState,
    engine: EngineState,
    models: Sequence[str],
    current: Sequence[PoolAssignment],
    shard_of: Callable[[str], int],
) -> list[PoolAssignment]:
    """What the worker should pull, in the order of its models."""
    if state is WorkerState.DRAINING:
        return []
    wanted = [PoolAssignment(pool=model, shard=shard_of(model)) for model in dict.fromkeys(models)]
    if state is WorkerState.ACTIVE and engine is EngineState.READY:
        return wanted
    return [pool for pool in wanted if pool in current]


def next_assignment(
    current: Assignment,
    term: int,
    pools: Sequence[PoolAssignment],
    load: str = "",
    adapters: list[str] | None = None,
) -> Assignment:
    """``current`` if it says the same in the same term, else the one that follows it. ``load``: the model that the
    engine is to serve, if it is another one than it started with; ``adapters``: those that it is to hold, if it could
    load any."""
    wanted = list(pools)
    same = (current.pools, current.load, current.adapters) == (wanted, load, adapters)
    version = current.version if same else min(current.version + 1, MAX_VERSION)
    if (term, version) == current.order:
        return current
    return Assignment(term=term, version=version, pools=wanted, load=load, adapters=adapters)
