"""The directory: which models exist and who serves them."""

from __future__ import annotations

import pytest

from queue_schemas import EngineState, Lane, LaneDepth, ModelNotFound, Pool, WorkerState
from router.model_directory import Directory, build_directory, check_model, model_list, pool_list
from scheduling.autoscale import ScalingRules
from tests.unit.router.fakes import worker

RULES = ScalingRules(max=9, worker_slots=4)


def test_models_are_the_union_of_fleet_declared_and_remembered() -> None:
    """Adapters count as models; only workers that take work count as serving."""
    fleet = [
        worker("base", "adapter"),
        worker("base", slots=2),
        worker("base", "cold", engine=EngineState.STARTING),
        worker("base").model_copy(update={"state": WorkerState.DRAINING}),
    ]
    directory = build_directory(fleet, [Pool("yesterday")], ["declared"], Directory(), 100)
    assert list(directory.pools) == ["adapter", "base", "cold", "declared", "yesterday"]
    assert (directory.pools["base"].workers, directory.pools["base"].slots) == (2, 6)
    assert directory.workers_of("cold") == directory.workers_of("unheard of") == 0


def test_the_first_seen_date_of_a_model_stays() -> None:
    """``created`` is when the Router first saw a model, whatever comes and goes."""
    before = build_directory([worker("m")], [], [], Directory(), 100)
    later = build_directory([], [Pool("m")], ["new"], before, 200)
    assert [item["created"] for item in model_list(later)["data"]] == [100, 200]  # type: ignore[index,attr-defined]


def test_a_pool_without_a_model_still_shows_its_jobs() -> None:
    """Jobs of a forgotten model are counted, and sums agree with the lanes."""
    lanes = {Lane.BATCH: LaneDepth(waiting=3, oldest_age_ms=9), Lane.INTERACTIVE: LaneDepth(waiting=1, leased=2)}
    pools = pool_list(build_directory([worker("m")], [], [], Directory(), 1), {Pool("old"): lanes}, RULES).pools
    assert [pool.model for pool in pools] == ["m", "old"]
    assert (pools[1].waiting, pools[1].leased, pools[1].outstanding, pools[1].oldest_age_ms) == (4, 2, 6, 9)
    assert (pools[0].workers, pools[0].slots, pools[0].lanes[Lane.BATCH].waiting) == (1, 4, 0)


def test_the_directory_knows_the_regions_of_a_model() -> None:
    """A region counts while a worker there takes work for the model; one that drains there does not."""
    fleet = [
        worker("m").model_copy(update={"region": "eu"}),
        worker("m").model_copy(update={"region": "us", "state": WorkerState.DRAINING}),
        worker("other").model_copy(update={"region": "us"}),
    ]
    directory = build_directory(fleet, [], ["cold"], Directory(), 1)
    assert directory.serves_in("m", "eu")
    assert not directory.serves_in("m", "us")
    assert directory.serves_in("other", "us")
    assert not directory.serves_in("cold", "eu")
    assert not directory.serves_in("unheard of", "eu")


def test_a_model_shows_its_engines_card() -> None:
    """[C9] ``max_model_len``, ``root``, ``parent`` and the rest; id and date are the Router's. What is known
    stays while no worker serves it."""
    card = {"max_model_len": 4096, "root": "/models/base", "parent": None, "owned_by": "vllm", "id": "x"}
    told = worker("m").model_copy(update={"cards": {"m": card}})
    larger = worker("m").model_copy(update={"worker_id": "w2", "cards": {"m": card | {"max_model_len": 8192}}})
    directory = build_directory([larger, told], [], [], Directory(), 100)
    shown = {"id": "m", "object": "model", "created": 100, "owned_by": "vllm"}
    assert model_list(directory)["data"] == [shown | {"max_model_len": 4096, "root": "/models/base", "parent": None}]
    [gone] = model_list(build_directory([], [Pool("m")], [], directory, 200))["data"]  # type: ignore[misc]
    assert gone["max_model_len"] == 4096


def test_served_models_are_listed_first() -> None:
    """[C9] Clients take the first one; the others say that nobody serves them, and what becomes of requests."""
    directory = build_directory([worker("z", "y")], [Pool("b")], ["a"], Directory(), 1)
    listed = model_list(directory)["data"]
    assert [one["id"] for one in listed] == ["y", "z", "a", "b"]  # type: ignore[attr-defined]
    assert ["hint" in one for one in listed] == [False, False, True, True]  # type: ignore[attr-defined]
    assert "wait in the queue" in listed[2]["hint"]  # type: ignore[index]
    assert "are refused" in model_list(directory, "refuse")["data"][2]["hint"]  # type: ignore[index]


def test_a_pool_says_how_many_workers_its_queue_calls_for() -> None:
    """Of every model, also of one that has no worker: that is what KEDA wakes it by."""
    lanes = {Lane.INTERACTIVE: LaneDepth(waiting=9, leased=1), Lane.BATCH: LaneDepth(waiting=300)}
    directory = build_directory([worker("busy", slots=2)], [], ["cold"], Directory(), 1)
    depths = {Pool("cold"): {Lane.BATCH: LaneDepth(waiting=1)}, Pool("busy"): lanes}
    wanted = {pool.model: pool.replicas_wanted for pool in pool_list(directory, depths, RULES).pools}
    assert wanted == {"busy": 6, "cold": 1}
    absurd = {Pool("busy"): {Lane.INTERACTIVE: LaneDepth(waiting=-1)}}
    assert pool_list(directory, absurd, RULES).pools[0].replicas_wanted is None


def test_a_model_with_an_autoscaler_is_not_refused() -> None:
    """Though no worker serves it and ``on_no_worker`` is ``refuse``: a request is what starts one."""
    directory = build_directory([], [Pool("scaled"), Pool("left")], [], Directory(), 1, scaled={Pool("scaled")})
    check_model("scaled", directory, "refuse")
    hints = {str(one["id"]): str(one["hint"]) for one in model_list(directory, "refuse")["data"]}  # type: ignore[attr-defined]
    assert "are refused" in hints["left"]
    assert "wait in the queue" in hints["scaled"]


def test_a_model_that_a_worker_could_load_is_listed_and_its_requests_wait() -> None:
    """Also where requests for models without a worker are refused; not once that worker drains."""
    fleet = [worker("a").model_copy(update={"loadable": ["a", "b"], "loaded": "a"})]
    directory = build_directory(fleet, [], [], Directory(), 1)
    assert {model: entry.workers for model, entry in directory.pools.items()} == {"a": 1, "b": 0}
    check_model("b", directory, "refuse")
    assert "wait in the queue" in str(model_list(directory, "refuse"))
    drained = [fleet[0].model_copy(update={"state": WorkerState.DRAINING})]
    with pytest.raises(ModelNotFound):
        check_model("b", build_directory(drained, [], [], Directory(), 1), "refuse")


def test_a_worker_that_is_to_load_another_model_serves_none() -> None:
    """Its engine still runs what it has, and claims nothing more."""
    told = worker("a").model_copy(update={"loadable": ["a", "b"], "loaded": "a"})
    told = told.model_copy(update={"assignment": told.assignment.model_copy(update={"load": "b"})})
    assert build_directory([told], [], [], Directory(), 1).workers_of("a") == 0


def test_adapters_that_could_be_loaded_are_models() -> None:
    """Of workers that are there; requests for them are queued, also where a model without a worker is refused."""
    sets = {"one": ["x", "y"], "two": ["z"], "nobody's": ["n"]}
    first = worker("base", "x").model_copy(update={"adapter_set": "one"})
    gone = worker("base").model_copy(update={"adapter_set": "two", "state": WorkerState.DRAINING})
    directory = build_directory([first, first, gone], [], [], Directory(), 1, adapter_sets=sets)
    assert list(directory.pools) == ["base", "x", "y"]
    assert (directory.workers_of("x"), directory.workers_of("y")) == (2, 0)
    check_model("y", directory, "refuse")
