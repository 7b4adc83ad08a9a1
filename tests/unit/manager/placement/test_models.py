"""The acting Manager moves workers between models as the queue needs them."""

from __future__ import annotations

from itertools import pairwise

import pytest

from manager.core import Registry
from manager.metrics import FleetMetrics
from manager.placement.models import RETRY_FAILED_S, ModelPlacement
from manager.placement.rounds import run_round
from queue_schemas import CannotStart, EngineState, Heartbeat, Lane, LaneDepth, Pool, Registration, WorkerState
from telemetry import MetricsRegistry
from tests.unit.manager.fakes import FakeQueue, fast_settings

START_S = 5.0
RULES = '{"a": {"start_s": 5}, "b": {"start_s": 5}}'


class Scene:
    """A Manager's placement over workers ``w1``, ``w2``, ... that could load a, b and c and begin with a."""

    def __init__(self, workers: int, placement: str = RULES, **fields: object) -> None:
        self.queue = FakeQueue()
        self.now = 0.0
        self.changed: list[str] = []
        self.registry = Registry(1, self.queue.shard_of, unresponsive_s=1e9, lease_s=1e9)
        for number in range(1, workers + 1):
            given = {"loadable": ["a", "b", "c"], "loaded": "a", "models": ["a"]} | fields
            self.registry.join(Registration.model_validate(_status(number) | {"worker_id": f"w{number}"} | given), 0.0)
        settings = fast_settings(placement=placement)
        metrics = FleetMetrics(MetricsRegistry("manager"))
        self.placement = ModelPlacement(settings, self.registry, metrics, self.changed.append, lambda: self.now)

    def waits(self, model: str, waiting: int = 1, age_s: float = 0.0, leased: int = 0) -> None:
        depth = LaneDepth(waiting=waiting, leased=leased, oldest_age_ms=round(age_s * 1000))
        self.queue.waiting[Pool(model)] = {Lane.INTERACTIVE: depth}

    def heard(self, number: int, loaded: str, engine: EngineState = EngineState.READY) -> None:
        models = [loaded] if engine is EngineState.READY else []
        status = _status(number) | {"loaded": loaded, "models": models, "engine": engine}
        self.registry.heartbeat(f"w{number}", Heartbeat.model_validate(status), self.now)

    async def round(self, now: float | None = None) -> dict[str, str]:
        """What each worker is told after a round."""
        self.now = self.now if now is None else now
        await run_round([self.placement], self.queue, 1_000)
        return {member.worker_id: member.assignment.load for member in self.registry.members()}


def _status(number: int) -> dict[str, object]:
    return {"session_id": f"w{number}.000000000000000{number}", "slots": 4, "engine": EngineState.READY}


async def test_jobs_that_nobody_serves_get_a_worker() -> None:
    """One that is idle, in the first round; what is decided is written down."""
    scene = Scene(2)
    scene.waits("b")
    assert await scene.round() == {"w1": "b", "w2": ""}
    assert scene.changed == ["w1"]
    assert await scene.round(1.0) == {"w1": "b", "w2": ""}
    scene.heard(1, "b", EngineState.STARTING)
    scene.waits("c")
    assert await scene.round(2.0) == {"w1": "b", "w2": "c"}


async def test_a_fleet_without_installed_models_costs_no_call() -> None:
    """The queue is asked for nothing, and nobody is told anything."""
    scene = Scene(2, loadable=[], loaded="")
    scene.waits("b", age_s=1e6)
    before = scene.queue.round_trips
    assert await scene.round(100.0) == {"w1": "", "w2": ""}
    assert scene.queue.round_trips == before


@pytest.mark.parametrize("fault", [{"broker_ok": False}, {"draining": True}])
async def test_workers_that_take_no_work_are_told_nothing(fault: dict[str, object]) -> None:
    """One that drains, or does not reach the queue."""
    scene = Scene(1, **fault)
    scene.waits("b")
    assert await scene.round() == {"w1": ""}


async def test_unresponsive_workers_are_told_nothing() -> None:
    """Another one is."""
    scene = Scene(2)
    scene.registry._unresponsive_s = 5.0
    scene.now = 6.0
    scene.heard(2, "a")
    scene.registry.sweep(6.0, lambda _: True)
    assert scene.registry.get("w1").state is WorkerState.UNRESPONSIVE
    scene.waits("b")
    assert await scene.round() == {"w1": "", "w2": "b"}


async def test_a_model_that_a_worker_could_not_load_is_left_to_others_for_a_while() -> None:
    """And that worker goes back to what waits, without waiting for a dwell time."""
    scene = Scene(1)
    scene.waits("b")
    await scene.round()
    scene.now = 1.0
    scene.heard(1, "b", EngineState.FAILED)
    scene.waits("a", age_s=1.0)
    assert await scene.round() == {"w1": "a"}
    scene.now = 9.0
    scene.heard(1, "a")
    scene.queue.waiting.pop(Pool("a"))
    assert await scene.round(100.0) == {"w1": "a"}
    assert await scene.round(RETRY_FAILED_S + 2.0) == {"w1": "b"}


async def test_a_worker_whose_engine_crashed_is_not_moved_for_it() -> None:
    """It was ready with its model, which is started again."""
    scene = Scene(1)
    scene.heard(1, "a", EngineState.FAILED)
    scene.waits("a")
    assert await scene.round(3.0) == {"w1": ""}


async def test_busy_models_take_turns_on_one_worker() -> None:
    """Each keeps it for the dwell time, twice its start, and longer where loading took longer."""
    scene = Scene(1)
    loaded, changes = "a", list[tuple[float, str]]()
    for now in range(1, 121):
        scene.now = float(now)
        for model in ("a", "b"):
            scene.waits(model, 9, float(now), 4 if model == loaded else 0)
        scene.heard(1, loaded)
        wanted = (await scene.round())["w1"] or loaded
        if wanted != loaded:
            loaded = wanted
            changes.append((scene.now, wanted))
    assert [model for _, model in changes[:4]] == ["b", "a", "b", "a"]
    assert min(later[0] - earlier[0] for earlier, later in pairwise(changes)) >= 2 * START_S
    assert len(changes) >= 3


async def test_what_does_not_answer_moves_nothing() -> None:
    """A shard that is away hides what its pools have: no worker of theirs is taken, and none is given."""
    for away_model, waiting, told in (("a", "c", ""), ("c", "c", ""), ("c", "b", "b")):
        scene = Scene(1)
        scene.queue.shard_of = {"a": 0, "b": 0, "c": 1}.__getitem__  # type: ignore[method-assign]
        scene.waits(waiting, age_s=50.0)
        hidden = scene.queue.shard_of(away_model)

        async def depths(
            away: set[int], scene: Scene = scene, hidden: int = hidden
        ) -> dict[Pool, dict[Lane, LaneDepth]]:
            away.add(hidden)
            return scene.queue.waiting

        scene.queue.depths = depths  # type: ignore[method-assign,assignment]
        assert await scene.round(60.0) == {"w1": told}


def test_the_rules_of_a_pool_are_checked() -> None:
    """A minimum above the maximum, and what is no rule."""
    assert fast_settings(placement=RULES).placement["a"].rules.start_s == START_S
    for wrong in ('{"a": {"min_workers": 2, "max_workers": 1}}', '{"a": {"start": 5}}', "a"):
        with pytest.raises(CannotStart, match="placement"):
            fast_settings(placement=wrong)
