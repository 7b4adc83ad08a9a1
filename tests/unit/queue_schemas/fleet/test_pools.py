"""Descriptions of pools add up their lanes and workers."""

from queue_schemas import LANES, Assignment, EngineState, Lane, LaneDepth, Pool, WorkerInfo, WorkerState
from queue_schemas.fleet.pools import describe_pools


def _worker(worker_id: str, *models: str, **fields: object) -> WorkerInfo:
    given = {"slots": 4, "engine": EngineState.READY, "assignment": Assignment(term=1, version=1)} | fields
    return WorkerInfo.model_validate(
        {"worker_id": worker_id, "session_id": f"{worker_id}.0000000000000001", "models": list(models), **given}
    )


def test_a_pool_adds_its_lanes_and_workers_up() -> None:
    """Totals are sums over the lanes, the age is the oldest, and only workers that take work count."""
    depths = {
        Pool("m"): {
            Lane.INTERACTIVE: LaneDepth(waiting=2, leased=3, oldest_age_ms=10),
            Lane.BATCH: LaneDepth(waiting=5, oldest_age_ms=900),
        }
    }
    workers = [
        _worker("a", "m"),
        _worker("b", "m", slots=2),
        _worker("c", "m", state=WorkerState.DRAINING),
        _worker("d", "m", engine=EngineState.STARTING),
    ]
    (pool,) = describe_pools(depths, workers, [])
    assert (pool.waiting, pool.leased, pool.outstanding, pool.oldest_age_ms) == (7, 3, 10, 900)
    assert (pool.workers, pool.slots) == (2, 6)
    assert set(pool.lanes) == set(LANES)


def test_pools_are_those_with_jobs_workers_or_a_memory() -> None:
    """A model is listed once, whether it waits, is served, or is only known."""
    pools = describe_pools({Pool("waits"): {}}, [_worker("a", "served", "waits")], ["known", "served"])
    assert [pool.model for pool in pools] == ["known", "served", "waits"]
    assert pools[0].outstanding == pools[0].workers == 0


def test_models_that_could_be_loaded_are_pools() -> None:
    """As long as a worker is there for them."""
    present = _worker("a", "one", loadable=["one", "two"])
    away = _worker("b", loadable=["three", "four"], broker_ok=False)
    pools = describe_pools({}, [present, away], [])
    assert [(pool.model, pool.workers) for pool in pools] == [("one", 1), ("two", 0)]
