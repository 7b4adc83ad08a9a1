"""What is said of workers in a cluster, and when there is nothing to wait for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from inferq.autoscale.settings import AutoscaleSettings
from inferq.on_ray.plan import RayPlan
from inferq.ray_cluster import RaySettings
from queue_schemas import CannotStart

pytest.importorskip("ray")

from inferq.on_ray import pools
from inferq.on_ray.pool_actor import PoolFacts
from inferq.on_ray.pools import PoolStatus, Workers, WorkerStatus, why_not_whole
from inferq.ray_cluster.actors import NodeFacts, Placed

ON_A_NODE = Placed("10.0.0.2", "abcdef0123", 7)


def facts(*, states: Mapping[str, str], last_failure: str = "", not_scaling: tuple[str, ...] = ()) -> PoolFacts:
    settings = AutoscaleSettings.load(pool="m", min=2, max=2, driver="ray", ray_gpus=1)
    return PoolFacts(settings, "digest", dict(states), frozenset(), not_scaling, last_failure)


@pytest.fixture(autouse=True)
def nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [NodeFacts("10.0.0.1", {"CPU": 8.0}, {"CPU": 6.0}), NodeFacts("10.0.0.2", {"CPU": 1.0, "GPU": 1.0}, {})]
    monkeypatch.setattr(pools, "alive_nodes", lambda: found)


def test_workers_without_a_place_are_told_what_they_ask_and_what_there_is() -> None:
    """Of every node what is free of what it has."""
    states = {"a": "ready", "b": pools.PENDING}
    assert why_not_whole(facts(states=states), states) == [
        "workers of m: 1 waits for a place with 1 CPU and 1 GPU each; free on the nodes: 10.0.0.1 6 of 8 CPUs and 0 of "
        "0 GPUs, 10.0.0.2 0 of 1 CPU and 0 of 1 GPU",
        "workers of m: 1 of 2 serve",
    ]


def test_what_the_last_worker_said_is_shown_until_all_serve() -> None:
    """Once, also between two starts, when the autoscaler itself has nothing to complain of."""
    words = "there is no executable /vllm"
    starting = {"a": "starting", "b": "starting"}
    assert why_not_whole(facts(states=starting, last_failure=words), starting) == [
        "workers of m: 0 of 2 serve, 2 starting",
        f"workers of m: the last that ended by itself said: {words}",
    ]
    pausing = facts(states={}, last_failure=words, not_scaling=(f"they end by themselves; the last one said: {words}",))
    assert sum(words in reason for reason in why_not_whole(pausing, {})) == 1
    ready = {"a": "ready", "b": "ready"}
    assert why_not_whole(facts(states=ready, last_failure=words), ready) == []


def test_workers_of_others_count_and_lent_ones_do_not() -> None:
    """As for the autoscaler."""
    states = {"a": "ready", "b": "foreign"}
    assert why_not_whole(facts(states=states), states) == []
    states = {"a": "ready", "b": "lent"}
    assert why_not_whole(facts(states=states), states) == ["workers of m: 1 of 2 serve"]


@pytest.mark.parametrize(
    ("status", "outdated", "settled"),
    [
        (PoolStatus("m", 1, 1, ()), False, True),
        (PoolStatus("m", 1, 1, ()), True, False),
        (PoolStatus("m", 1, 1, ("0 of 1 serve",)), False, False),
        (PoolStatus("m", 1, 1, ("0 of 1 serve",), "no such executable"), True, True),
    ],
)
def test_up_waits_for_what_can_still_come(status: PoolStatus, outdated: bool, settled: bool) -> None:
    """For workers that start and for those that are to be replaced, not after one has failed, nor for other pools."""
    other = PoolStatus("other", 1, 1, ("0 of 1 serve",))
    found = Workers((status, other), (WorkerStatus("a", "m", "ready", outdated, ON_A_NODE),))
    assert found.settled("m") == settled


class FakeCluster:
    """Actors by name; those of pools answer with ``facts``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[AutoscaleSettings] = []
        self.stopped: list[str] = []
        self.facts: PoolFacts | None = None
        monkeypatch.setattr(pools, "_ask", lambda name: self.facts)
        monkeypatch.setattr(pools, "_remove_pool", lambda name: self.stopped.append(name) or self.facts is not None)
        monkeypatch.setattr(pools, "make_pool", self._make)
        monkeypatch.setattr(pools, "placed_actors", lambda prefix: {})
        monkeypatch.setattr(pools.ray, "get", lambda answer, timeout: answer)
        monkeypatch.setattr(pools.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))

    def _make(self, settings: AutoscaleSettings, telemetry: object, digest: str) -> Any:
        self.made.append(settings)
        self.facts = PoolFacts(settings, digest, {}, frozenset(), (), "")
        return SimpleNamespace(facts=SimpleNamespace(remote=lambda: self.facts))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    return FakeCluster(monkeypatch)


def settle(**settings: object) -> str:
    asked = {"host": "10.0.0.1", "model": "m"} | settings
    plan = RayPlan.load(RaySettings.load(**asked), redis_url="redis://127.0.0.1")
    return pools.settle_pool(plan, lambda step: None)


def test_a_pool_is_made_changed_and_removed_and_else_left_alone(cluster: FakeCluster) -> None:
    """Its autoscaler is replaced by one with the new settings, which does the rest; what that will be is said."""
    assert settle() == "workers of m: 1"
    assert settle() == ""
    assert settle(workers=2, max_workers=3) == "workers of m: 2 to 3"
    assert settle(workers=2, worker_args=["--slots", "4"]) == "workers of m: 2, replaced one by one"
    assert [(made.min, made.max) for made in cluster.made] == [(1, 1), (2, 3), (2, 2)]
    assert settle(workers=0) == "workers of m removed"
    assert settle(model="") == ""
    assert len(cluster.made) == 3
    assert set(cluster.stopped) == {"pool:m"}


def test_a_router_that_other_nodes_cannot_reach_is_refused(cluster: FakeCluster) -> None:
    """Workers there would never register."""
    with pytest.raises(CannotStart, match=r"cannot reach the Router at http://127.0.0.1:8000.*--advertise-url"):
        settle(host="127.0.0.1")
    assert cluster.made == []
