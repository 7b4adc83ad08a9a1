"""One autoscaler over a fleet in memory: it scales by the queue, drains before it removes, and holds when in doubt."""

from __future__ import annotations

import pytest

from inferq.autoscale.drivers.port import DriverFailed
from inferq.autoscale.settings import AutoscaleSettings
from queue_schemas import LANES, CannotStart, EngineState, Lane, LaneDepth
from tests.unit.inferq.autoscale.scene import FakeDriver, FakeFabric, Scene


@pytest.mark.parametrize("lane", LANES)
async def test_one_job_wakes_a_pool_at_zero(lane: Lane) -> None:
    """Whoever waits for it; and one worker is not asked for twice while it starts."""
    scene = Scene()
    await scene.look(3)
    assert scene.driver.asked == []
    scene.fabric.waits(1, lane=lane)
    await scene.look(5)
    assert scene.driver.asked == [1]
    assert scene.autoscaler.reasons == []


async def test_a_burst_starts_what_it_needs_at_once_up_to_the_maximum() -> None:
    """Starting workers count, so the same burst starts no more."""
    scene = Scene()
    scene.fabric.waits(9)
    await scene.look(3)
    assert scene.driver.asked == [3]
    scene.fabric.waits(1_000)
    await scene.look(3)
    assert scene.driver.asked == [3, 5]


async def test_workers_are_drained_and_removed_only_once_they_are_gone() -> None:
    """The least busy first. A draining worker is not removed for as long as the registry knows it."""
    scene = Scene(scale_in_after="2s")
    scene.fabric.waits(9)
    await scene.look()
    scene.all_join()
    scene.fabric.join("w-1", running=1)
    scene.fabric.join("w-2", running=3)
    scene.fabric.join("w-3", running=2)
    scene.fabric.waits(0, leased=6)
    await scene.look(4)
    assert scene.fabric.drained == ["w-1"]
    await scene.look(30)
    assert scene.driver.removed == []
    assert set(scene.fabric.drained) == {"w-1"}
    del scene.fabric.registry["w-1"]
    await scene.look()
    assert scene.driver.removed == ["w-1"]
    assert sorted(scene.driver.running) == ["w-2", "w-3"]


async def test_what_drains_still_counts_against_the_maximum() -> None:
    """It has its engine until it is gone."""
    scene = Scene(scale_in_after="2s", max=2)
    scene.fabric.waits(8)
    await scene.look()
    scene.all_join()
    scene.fabric.waits(0)
    await scene.look(4)
    assert sorted(scene.fabric.drained) == ["w-1", "w-2"]
    scene.fabric.waits(8)
    await scene.look(3)
    assert scene.driver.asked == [2]
    scene.fabric.registry.clear()
    await scene.look(2)
    assert scene.driver.asked == [2, 2]
    assert len(scene.driver.running) == 2


async def test_a_driver_that_drains_by_itself_is_told_at_once() -> None:
    """As Kubernetes does, by SIGTERM; the Manager is not asked to, or the pod would start anew."""
    scene = Scene(FakeDriver(drains=True), scale_in_after="2s")
    scene.fabric.waits(4)
    await scene.look()
    scene.all_join()
    scene.fabric.waits(0)
    await scene.look(4)
    assert scene.driver.removed == ["w-1"]
    assert scene.fabric.drained == []


async def test_what_a_platform_keeps_running_is_left_to_it() -> None:
    """A pod that does not get ready, and one whose worker an operator drained: the fleet is not made smaller for them,
    as other pods might go. The one that is back under its name serves and counts again."""
    scene = Scene(FakeDriver(drains=True), max=3, min=3)
    await scene.look()
    scene.all_join()
    scene.fabric.join("w-1", engine=EngineState.STARTING)
    await scene.fabric.drain("w-2")
    await scene.look()
    assert scene.value("inferq_autoscaler_workers", state="leaving") == 1
    scene.fabric.join("w-2")
    await scene.look(150)
    assert scene.value("inferq_autoscaler_workers", state="ready") == 2
    assert scene.value("inferq_autoscaler_workers", state="leaving") == 0
    assert scene.autoscaler.reasons == ["workers that take no work after 100 s: w-1"]
    assert (scene.driver.removed, scene.driver.asked) == ([], [3])


async def test_workers_of_others_count_and_are_left_alone() -> None:
    """Started by hand, or by the autoscaler before on another machine."""
    scene = Scene(scale_in_after="2s", max=2)
    scene.fabric.join("by-hand")
    scene.fabric.waits(8)
    await scene.look(2)
    assert scene.driver.asked == [1]
    scene.all_join()
    scene.fabric.waits(0)
    await scene.look(6)
    assert scene.fabric.drained == ["w-1"]
    assert scene.value("inferq_autoscaler_workers", state="foreign") == 1


@pytest.mark.parametrize("what", ["claim", "pool", "workers"])
async def test_missing_figures_change_nothing_and_are_said(what: str) -> None:
    """No worker is started or drained for as long as the queue, the registry or the Manager does not answer."""
    scene = Scene(scale_in_after="2s")
    scene.fabric.waits(8)
    await scene.look()
    scene.all_join()
    scene.fabric.waits(0)
    scene.fabric.down = {what}
    await scene.look(20)
    assert (scene.fabric.drained, scene.driver.asked) == ([], [2])
    assert any(f"{what} is away" in reason for reason in scene.autoscaler.reasons)
    scene.fabric.down = set()
    await scene.look()
    assert scene.fabric.drained == [], "what was not seen does not count as quiet"
    await scene.look(3)
    assert sorted(scene.fabric.drained) == ["w-1", "w-2"]
    assert scene.autoscaler.reasons == []


async def test_absurd_figures_change_nothing_and_are_said() -> None:
    """A queue of less than nothing."""
    scene = Scene()
    scene.fabric.lanes = {Lane.INTERACTIVE: LaneDepth(waiting=-3)}
    await scene.look(2)
    assert scene.driver.asked == []
    assert scene.autoscaler.reasons == ["nothing changes: waiting interactive: -3 cannot be"]
    assert scene.value("inferq_autoscaler_failures_total", cause="queue") == 2


async def test_a_failing_driver_is_asked_again_after_a_pause() -> None:
    """The pause grows; its words stand in the reasons until it works."""
    scene = Scene()
    scene.driver.fault = "no quota left"
    scene.fabric.waits(1)
    await scene.look(20, every_s=0.5)
    assert scene.autoscaler.reasons == ["no quota left"]
    assert 2 <= scene.value("inferq_autoscaler_failures_total", cause="driver") <= 5
    scene.driver.fault = ""
    await scene.look(1, every_s=31)
    assert scene.autoscaler.reasons == []
    assert scene.driver.asked == [1]


async def test_workers_that_cannot_be_started_do_not_keep_others_from_leaving() -> None:
    """What drains is removed, although the next start fails."""
    scene = Scene(max=3)
    scene.fabric.waits(4)
    await scene.look()
    scene.all_join()
    await scene.fabric.drain("w-1")
    await scene.look()
    del scene.fabric.registry["w-1"]

    async def refuse(count: int) -> None:
        raise DriverFailed("no quota left")

    scene.driver.scale_to = refuse  # type: ignore[method-assign]
    scene.fabric.waits(12)
    await scene.look()
    assert scene.driver.removed == ["w-1"]
    assert scene.autoscaler.reasons == ["no quota left"]


async def test_a_hanging_driver_is_given_up() -> None:
    """A step has a limit, whatever the driver does."""
    scene = Scene(driver_timeout=1)
    scene.driver.hangs = True
    scene.fabric.waits(1)
    await scene.look()
    assert "did not finish a step" in scene.autoscaler.reasons[0]


async def test_a_driver_that_lies_is_found_out_and_kept_within_bounds() -> None:
    """Workers that it names but that never join are missing after their time, are no capacity, and are said."""
    scene = Scene(max=3)
    scene.driver.ignores_removals = True
    scene.driver.running = ["ghost-1", "ghost-2"]
    scene.fabric.waits(4)
    await scene.look(50)
    assert scene.driver.asked == []
    await scene.look(60)
    assert scene.driver.asked == [3], "one real worker is asked for, and the ghosts count against the maximum"
    assert any("take no work after 100 s: ghost-1" in reason for reason in scene.autoscaler.reasons)
    assert set(scene.driver.removed) == {"ghost-1", "ghost-2"}
    assert len(scene.driver.removed) <= 12, "it is not told at every look"
    scene.fabric.waits(1_000)
    scene.all_join()
    await scene.look(5)
    assert len(scene.driver.running) == 3
    await scene.look(1, every_s=200)
    assert any("have not ended 120 s after they were to: ghost-2" in one for one in scene.autoscaler.reasons)


async def test_a_worker_whose_engine_never_gets_ready_is_replaced() -> None:
    """It has registered, so it is drained first."""
    scene = Scene(max=2)
    scene.fabric.waits(1)
    await scene.look()
    scene.fabric.join("w-1", engine=EngineState.STARTING)
    await scene.look(50)
    assert scene.driver.asked == [1]
    await scene.look(55)
    assert scene.fabric.drained == ["w-1"]
    assert scene.driver.asked == [1, 2]
    del scene.fabric.registry["w-1"]
    await scene.look()
    assert scene.driver.removed == ["w-1"]


async def test_one_of_two_autoscalers_acts() -> None:
    """The other looks on, and takes over when the first gives the pool up."""
    fabric = FakeFabric()
    first, second = Scene(fabric=fabric), Scene(fabric=fabric)
    fabric.waits(4)
    await first.look()
    await second.look(3)
    assert (first.driver.asked, second.driver.asked) == ([1], [])
    assert second.autoscaler.reasons == ["another autoscaler acts for m"]
    await first.autoscaler.give_up()
    await second.look()
    assert second.driver.asked == [1]


async def test_nothing_is_done_on_a_claim_that_may_have_lapsed() -> None:
    """A step that took longer than the claim lasts is the last of its look."""
    scene = Scene()
    scene.fabric.waits(4)
    workers = scene.fabric.workers

    async def slow() -> list[object]:
        scene.now_s += scene.settings.claim_ttl_ms / 1000
        return await workers()  # type: ignore[return-value]

    scene.fabric.workers = slow  # type: ignore[method-assign,assignment]
    await scene.look(3)
    assert scene.driver.asked == []


async def test_flapping_load_starts_workers_once() -> None:
    """Two seconds of work, five of none, over and over, with a window of ten."""
    scene = Scene()
    for _ in range(20):
        scene.fabric.waits(12)
        await scene.look(2)
        scene.all_join()
        scene.fabric.waits(0)
        await scene.look(5)
    assert scene.driver.asked == [3]
    assert scene.fabric.drained == []


async def test_the_time_to_start_is_observed_and_lengthens_the_window() -> None:
    """A worker that took 60 s to start is kept for 60 s."""
    scene = Scene(scale_in_after="2s")
    scene.fabric.waits(1)
    await scene.look(2)
    scene.now_s += 60
    scene.all_join()
    await scene.look()
    assert scene.value("inferq_autoscaler_start_up_seconds") == pytest.approx(61, abs=2)
    scene.fabric.waits(0)
    await scene.look(55)
    assert scene.fabric.drained == []
    await scene.look(15)
    assert scene.fabric.drained == ["w-1"]


async def test_the_minimum_runs_without_any_job() -> None:
    """And is kept; a worker that dies is replaced."""
    scene = Scene(min=2)
    await scene.look()
    scene.all_join()
    await scene.look(30)
    assert scene.driver.asked == [2]
    scene.driver.running.remove("w-1")
    del scene.fabric.registry["w-1"]
    await scene.look()
    assert sorted(scene.driver.running) == ["w-2", "w-3"]


async def test_all_workers_are_drained_at_the_end_where_that_is_asked() -> None:
    """It returns once they are gone."""
    scene = Scene(min=2, interval_ms=20)
    await scene.look()
    scene.all_join()
    drain = scene.fabric.drain

    async def gone_at_once(worker_id: str) -> None:
        await drain(worker_id)
        del scene.fabric.registry[worker_id]

    scene.fabric.drain = gone_at_once  # type: ignore[method-assign]
    await scene.autoscaler.drain_all()
    assert (scene.driver.running, sorted(scene.driver.removed)) == ([], ["w-1", "w-2"])


async def test_what_full_workers_served_is_remembered() -> None:
    """Two full ones served 2.5 jobs a second each. Later jobs get done sooner on idle slots, so by their run times one
    worker would do for four a second, and it would not."""
    scene = Scene(scale_in_after="2s")
    scene.fabric.waits(8)
    await scene.look()
    scene.all_join()
    full = LaneDepth(
        waiting=1, leased=8, oldest_age_ms=1_500, cost=200, ms_per_cost=8.0, ms_per_job=1_600.0, arrivals_per_s=4.0
    )
    scene.fabric.lanes = {Lane.INTERACTIVE: full}
    await scene.look(3)
    assert scene.value("inferq_autoscaler_worker_jobs_per_second") == pytest.approx(2.5, rel=0.001)
    idle = LaneDepth(leased=1, ms_per_cost=2.0, ms_per_job=400.0, arrivals_per_s=4.0)
    scene.fabric.lanes = {Lane.INTERACTIVE: idle}
    await scene.look(10)
    assert (scene.driver.asked, scene.fabric.drained) == ([2], [])
    scene.fabric.lanes = {Lane.INTERACTIVE: idle.model_copy(update={"arrivals_per_s": 1.0})}
    await scene.look(4)
    assert len(scene.fabric.drained) == 1


@pytest.mark.parametrize("lane", LANES)
async def test_a_job_for_an_adapter_wakes_its_models_workers(lane: Lane) -> None:
    """And is counted like the model's own; without the setting it is not."""
    alone, scene = Scene(), Scene(adapters="a,b")
    for one in (alone, scene):
        one.fabric.of_adapters["b"] = {lane: LaneDepth(waiting=1)}
        await one.look(3)
    assert (alone.driver.asked, scene.driver.asked) == ([], [1])
    assert set(scene.fabric.holders) == {"m", "a", "b"}
    scene.fabric.waits(5)
    scene.fabric.of_adapters = {name: {Lane.INTERACTIVE: LaneDepth(waiting=5)} for name in "ab"}
    await scene.look()
    assert scene.driver.asked == [1, 4]
    await scene.autoscaler.give_up()
    assert scene.fabric.holders == {}


async def test_an_adapter_that_another_autoscaler_scales_is_left_to_it() -> None:
    """It is said, and the pool is scaled all the same. Who only looks on claims no adapter."""
    fabric = FakeFabric()
    other, scene, standby = (
        Scene(fabric=fabric, pool="a"),
        Scene(fabric=fabric, adapters=["a", "b"]),
        Scene(fabric=fabric, adapters=["a", "b"]),
    )
    fabric.of_adapters = {"a": {Lane.INTERACTIVE: LaneDepth(waiting=8)}}
    fabric.waits(4)
    await other.look()
    await scene.look()
    await standby.look()
    assert scene.driver.asked == [1]
    assert scene.autoscaler.reasons == ["another autoscaler acts for a: their jobs do not count here"]
    assert len({fabric.holders[name] for name in ("m", "b")}) == 1
    assert standby.driver.asked == []


@pytest.mark.parametrize("adapters", [["m"], ["a", "a"], ["a\nb"], [f"a{number}" for number in range(257)]])
def test_adapters_that_cannot_be_are_refused(adapters: list[str]) -> None:
    with pytest.raises(CannotStart, match=r"adapters|model|once"):
        AutoscaleSettings.load(pool="m", adapters=adapters)


async def test_outdated_workers_are_replaced_one_by_one() -> None:
    """The next goes once its forerunner's successor takes work, and what it ran is finished first."""
    scene = Scene(min=2, max=2)
    await scene.look()
    scene.all_join()
    await scene.look()
    scene.fabric.join("w-1", running=1)
    scene.driver.outdated = frozenset({"w-1", "w-2"})
    await scene.look(3)
    assert scene.fabric.drained == ["w-2"]
    del scene.fabric.registry["w-2"]
    await scene.look(3)
    assert sorted(scene.driver.running) == ["w-1", "w-3"]
    await scene.look(20)
    assert scene.fabric.drained == ["w-2"], "the new one takes no work yet"
    scene.all_join()
    await scene.look()
    assert scene.fabric.drained == ["w-2", "w-1"]
    del scene.fabric.registry["w-1"]
    await scene.look(3)
    scene.all_join()
    await scene.look(20)
    assert sorted(scene.driver.running) == ["w-3", "w-4"]
    assert scene.fabric.drained == ["w-2", "w-1"]


async def test_outdated_workers_that_serve_nobody_go_at_once_and_first() -> None:
    """Settings that could not work are corrected without waiting for workers that never come; scale-in takes them
    before others."""
    scene = Scene(min=2, max=2)
    await scene.look()
    scene.driver.outdated = frozenset({"w-1", "w-2"})
    await scene.look(2)
    assert sorted(scene.driver.removed) == ["w-1", "w-2"]
    smaller = Scene(driver=scene.driver, min=1, max=1)
    scene.driver.running, scene.driver.outdated, scene.driver.removed = ["w-3", "w-4"], frozenset({"w-3"}), []
    smaller.all_join()
    smaller.fabric.join("w-3", running=3)
    await smaller.look(1)
    assert smaller.fabric.drained == ["w-3"]
