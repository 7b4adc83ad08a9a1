"""The acting Manager has workers load and unload adapters as the queue needs them."""

from __future__ import annotations

from itertools import pairwise

import pytest

from manager.core import Registry
from manager.metrics import FleetMetrics
from manager.placement.adapters import MAX_RETRY_FAILED_S, RETRY_FAILED_S, AdapterPlacement
from manager.placement.models import ModelPlacement
from manager.placement.rounds import run_round
from queue_schemas import ControlKind, EngineState, Heartbeat, Lane, LaneDepth, Pool, Registration, UnknownWorker
from queue_schemas.fleet.adapters import adapter_set_of
from scheduling.adapters import STAY_S
from telemetry import MetricsRegistry
from tests.unit.manager.fakes import FakeQueue, fast_settings

NAMES = ["x", "y", "z"]


class Scene:
    """A Manager's placement over workers ``w1``, ``w2``, ... of model ``m``, with room for two of three adapters."""

    def __init__(self, workers: int = 1, **fields: object) -> None:
        self.queue = FakeQueue()
        self.now = 0.0
        self.changed: list[str] = []
        self.registry = self.new_registry(1)
        for number in range(1, workers + 1):
            self.join(number, **fields)
        self.begin()

    def new_registry(self, term: int) -> Registry:
        return Registry(term, self.queue.shard_of, unresponsive_s=1e9, lease_s=1e9)

    def begin(self) -> None:
        metrics = FleetMetrics(MetricsRegistry("manager"))
        parts = (self.registry, metrics, self.changed.append, lambda: self.now)
        self.placement = AdapterPlacement(fast_settings(), self.queue, *parts)
        self.models = ModelPlacement(fast_settings(), *parts)

    def join(self, number: int, **fields: object) -> None:
        given = _status(number) | {"worker_id": f"w{number}", "adapters": NAMES} | fields
        self.registry.join(Registration.model_validate(given), self.now)

    def waits(self, pool: str, waiting: int = 1, leased: int = 0) -> None:
        self.queue.waiting[Pool(pool)] = {Lane.INTERACTIVE: LaneDepth(waiting=waiting, leased=leased)}

    def heard(self, number: int, *adapters: str, **fields: object) -> list[str]:
        """The pools that a worker is to pull which lists these adapters."""
        status = _status(number) | {"models": ["m", *adapters]} | fields
        member = self.registry.heartbeat(f"w{number}", Heartbeat.model_validate(status), self.now)
        return [part.pool for part in member.assignment.pools]

    def told(self, number: int = 1) -> list[str] | None:
        return self.registry.get(f"w{number}").assignment.adapters

    async def round(self, after_s: float = 0.0) -> list[str] | None:
        """What the first worker is told after a round."""
        self.now += after_s
        await run_round([self.placement], self.queue, 1_000)
        return self.told()


def _status(number: int) -> dict[str, object]:
    session_id = f"w{number}.000000000000000{number}"
    return {"session_id": session_id, "slots": 4, "engine": EngineState.READY, "models": ["m"], "adapter_room": 2}


async def test_an_adapter_with_jobs_is_loaded_and_then_pulled() -> None:
    """It is pulled once the engine lists it; what is decided is written down."""
    scene = Scene()
    assert scene.told() == []
    scene.waits("x")
    assert await scene.round() == ["x"]
    assert scene.changed == ["w1"]
    assert await scene.round(1.0) == ["x"]
    assert scene.changed == ["w1"]
    assert scene.heard(1) == ["m"]
    assert scene.heard(1, "x") == ["m", "x"]


async def test_a_worker_is_told_at_once() -> None:
    """Its heartbeat is asked for; a queue that does not pass that on costs nothing."""
    scene = Scene(3)
    scene.waits("x")
    await scene.round()
    assert [session for session, _ in scene.queue.controls] == ["w1.0000000000000001"]
    assert scene.queue.controls[0][1].kind is ControlKind.PING
    scene.waits("y")
    scene.queue.away = {0, 1}
    await scene.round(1.0)
    assert scene.told(2) == ["y"]
    assert len(scene.queue.controls) == 1


async def test_what_was_needed_least_lately_makes_room_and_is_not_pulled() -> None:
    """The worker may still list it while its last jobs run."""
    scene = Scene()
    for adapter in ("x", "y"):
        scene.waits(adapter)
    assert await scene.round() == ["x", "y"]
    scene.heard(1, "x", "y")
    await scene.round(1.0)
    scene.queue.waiting.pop(Pool("y"))
    await scene.round(1.0)
    scene.queue.waiting.clear()
    scene.waits("z")
    assert await scene.round(STAY_S) == ["x", "z"]
    assert scene.heard(1, "x", "y") == ["m", "x"]
    assert scene.heard(1, "x", "z") == ["m", "x", "z"]


async def test_a_fleet_without_adapters_costs_no_call() -> None:
    """And its assignments say nothing of any."""
    scene = Scene(2, adapters=[], adapter_room=0)
    before = scene.queue.round_trips
    assert await scene.round() is None
    assert scene.queue.round_trips == before
    assert "adapters" not in scene.registry.get("w1").assignment.model_dump()


@pytest.mark.parametrize(
    "fields",
    [{"engine": EngineState.STARTING}, {"broker_ok": False}, {"draining": True}, {"adapter_room": 0}],
)
async def test_workers_that_cannot_load_now_are_told_nothing(fields: dict[str, object]) -> None:
    """Another one is."""
    scene = Scene()
    scene.join(1, **fields)
    scene.join(2)
    scene.waits("x")
    assert await scene.round() == []
    assert scene.told(2) == ["x"]


async def test_an_adapter_that_failed_is_asked_for_ever_more_rarely() -> None:
    """Of that worker; at once of another one. Once it was loaded, all is forgotten."""
    scene = Scene()
    scene.waits("x")
    pauses = []
    for _ in range(9):
        while await scene.round(1.0) == []:
            pass
        pauses.append(scene.now)
        scene.heard(1, adapter_failures={"x": "rank 64 is too large"})
        assert await scene.round() == []
        scene.heard(1)
    apart = [later - earlier for earlier, later in pairwise(pauses)]
    assert apart == [min(RETRY_FAILED_S * 2**n, MAX_RETRY_FAILED_S) for n in range(8)]
    scene.join(2)
    await scene.round()
    assert scene.told(2) == ["x"]
    while scene.placement._refused:
        await scene.round(60.0)
    assert scene.now < pauses[-1] + 3 * MAX_RETRY_FAILED_S


async def test_a_failure_is_counted_once() -> None:
    """The worker goes on reporting it until it has heard that the adapter is not wanted any more."""
    scene = Scene()
    scene.waits("x")
    await scene.round()
    scene.heard(1, adapter_failures={"x": "no"})
    await scene.round()
    for _ in range(4):
        scene.heard(1, adapter_failures={"x": "no"})
        assert await scene.round(1.0) == []
    scene.heard(1)
    assert await scene.round(1.0) == ["x"]


async def test_what_does_not_answer_moves_nothing() -> None:
    """Of adapters on a shard that is away it is not known whether they are needed: they stay."""
    scene = Scene(adapter_room=1)
    scene.queue.shard_of = lambda pool: int(pool == "y")  # type: ignore[method-assign]
    scene.waits("y")
    await scene.round()
    scene.heard(1, "y", adapter_room=1)
    scene.queue.waiting.clear()
    scene.waits("x")

    async def depths(away: set[int]) -> dict[Pool, dict[Lane, LaneDepth]]:
        away.add(1)
        return scene.queue.waiting

    scene.queue.depths = depths  # type: ignore[method-assign,assignment]
    assert await scene.round(1_000.0) == ["y"]


async def test_the_next_manager_goes_on_with_what_was_told() -> None:
    """From the snapshot, once for all workers that could load the same. If that is lost, the worker says again what it
    could load, and keeps what it has."""
    scene = Scene(2)
    scene.waits("x")
    await scene.round()
    scene.heard(1, "x")
    infos = [member.info() for member in scene.registry.members()]
    sets = scene.registry.adapter_sets()
    assert sets == {adapter_set_of(NAMES): frozenset(NAMES)}
    assert scene.registry.get("w1").adapters.names is scene.registry.get("w2").adapters.names
    assert all("adapters" not in info.model_dump(exclude={"assignment"}) for info in infos)
    before = scene.registry

    scene.registry = scene.new_registry(2)
    scene.registry.load(infos, 100.0, sets)
    assert scene.told() == ["x"]
    assert scene.heard(1, "x") == ["m", "x"]

    scene.registry = scene.new_registry(3)
    scene.registry.load(infos, 100.0, {})
    assert scene.told() == ["x"]
    with pytest.raises(UnknownWorker, match="register again"):
        scene.heard(1, "x")
    scene.join(1, models=["m", "x"])
    assert scene.heard(1, "x") == ["m", "x"]
    assert before.get("w1").adapters.told.keys() == scene.registry.get("w1").adapters.told.keys() == {"x"}

    scene.registry = scene.new_registry(4)
    scene.join(1, models=["m", "x"])
    assert scene.told() == ["x"]
    assert scene.heard(1, "x") == ["m", "x"]


async def test_a_worker_with_less_room_or_other_adapters_is_told_less() -> None:
    """When it registers again, or says that it has no room any more."""
    scene = Scene()
    for adapter in ("x", "y"):
        scene.waits(adapter)
    assert await scene.round() == ["x", "y"]
    scene.heard(1, "x", adapter_room=1)
    assert scene.told() == ["x"]
    scene.join(1, adapters=["y", "z"])
    assert scene.told() == []
    scene.heard(1, adapter_room=0)
    assert await scene.round() == []


async def test_jobs_of_adapters_bring_workers_back_to_their_base_model() -> None:
    """A worker that could load several models loads the one that a waiting adapter fits, then the adapter; and none is
    told an adapter of another model than it has loaded."""
    scene = Scene(loadable=["m", "n"], loaded="n", models=["n"], adapter_base="m")
    scene.waits("x")
    assert await scene.round() == []
    await run_round([scene.models], scene.queue, 1_000)
    member = scene.registry.get("w1")
    assert (member.assignment.load, member.assignment.pools) == ("m", [])
    assert await scene.round() == []
    scene.heard(1, loaded="m", models=["m"])
    assert await scene.round() == ["x"]
    assert scene.heard(1, "x", loaded="m") == ["m", "x"]
    # The jobs of the adapter hold the worker; without them it goes, and the adapter with it.
    scene.waits("x", 0, 4)
    scene.waits("n")
    scene.now += 200.0
    await run_round([scene.models], scene.queue, 1_000)
    assert scene.registry.get("w1").assignment.load == "m"
    scene.queue.waiting.pop(Pool("x"))
    await run_round([scene.models], scene.queue, 1_000)
    assert (scene.registry.get("w1").assignment.load, scene.told()) == ("n", [])
