from hypothesis import given
from hypothesis import strategies as st

from manager.core import next_assignment, wanted_pools
from queue_schemas import LANES, Assignment, EngineState, PoolAssignment, WorkerState, shard_of_pool


def _shard_of(pool: str) -> int:
    return shard_of_pool(pool, 4)


def _pools(*models: str) -> list[PoolAssignment]:
    return [PoolAssignment(pool=model, shard=_shard_of(model)) for model in models]


def test_a_ready_worker_pulls_what_it_serves() -> None:
    """Every model once, every lane, on the shard of the model's pool."""
    pools = wanted_pools(WorkerState.ACTIVE, EngineState.READY, ["m", "lora", "m"], [], _shard_of)
    assert pools == _pools("m", "lora")
    assert pools[0].lanes == list(LANES)
    assert pools[0].shard == shard_of_pool("m", 4)


def test_unresponsive_workers_get_nothing_new_and_keep_what_they_have() -> None:
    """An unresponsive worker, or one without a ready engine, keeps what it still serves; a draining one has nothing."""
    current = _pools("old", "kept")
    for state, engine in (
        (WorkerState.UNRESPONSIVE, EngineState.READY),
        (WorkerState.ACTIVE, EngineState.STARTING),
        (WorkerState.ACTIVE, EngineState.FAILED),
    ):
        assert wanted_pools(state, engine, ["kept", "new"], current, _shard_of) == _pools("kept")
    assert wanted_pools(WorkerState.DRAINING, EngineState.READY, ["kept"], current, _shard_of) == []


def test_the_version_rises_exactly_when_the_content_changes() -> None:
    """The same content is the same assignment; other content is the next version."""
    first = next_assignment(Assignment(term=0, version=0), 1, _pools("a"))
    assert first.order == (1, 1)
    assert next_assignment(first, 1, _pools("a")) is first
    assert next_assignment(first, 1, _pools("a", "b")).order == (1, 2)


@given(st.lists(st.tuples(st.booleans(), st.sets(st.sampled_from("abc"))), max_size=30))
def test_assignments_only_go_up(steps: list[tuple[bool, set[str]]]) -> None:
    """Whatever changes, terms included, the order never falls, and rises strictly with the content."""
    term, current = 1, Assignment(term=0, version=0)
    for new_term, models in steps:
        term += new_term
        following = next_assignment(current, term, _pools(*sorted(models)))
        assert following.order >= current.order
        assert (following.pools == current.pools) or following.order > current.order
        current = following
