"""What Managers keep in Redis: who acts, who is in the fleet, which pools are known."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker import Broker, RememberedPools
from broker.operations.known_pools import POOL_MEMORY_MS
from queue_schemas import Assignment, EngineState, WorkerInfo, new_session_id
from queue_schemas.fleet.acting_manager import ActingManager
from queue_schemas.fleet.adapters import adapter_set_of
from queue_schemas.keys import ADAPTERS, MANAGER, POOLS, WORKERS, autoscaler_key
from tests.support.waiting import eventually


def info(worker_id: str, **fields: Any) -> WorkerInfo:
    """A registry entry."""
    return WorkerInfo(
        worker_id=worker_id,
        session_id=new_session_id(worker_id),
        assignment=Assignment(term=1, version=1),
        **fields,
    )


async def test_one_manager_acts_at_a_time(broker: Broker) -> None:
    """The lease belongs to one; the other stands by; the term names the reign."""
    assert await broker.fleet.acquire_leader_lease("a", 5_000) == 1
    assert await broker.fleet.acquire_leader_lease("b", 5_000) is None
    assert await broker.fleet.acquire_leader_lease("a", 5_000) == 1


async def test_a_resigned_manager_is_followed_at_once(broker: Broker) -> None:
    """A clean shutdown does not make the fleet wait, and the next reign has a higher term."""
    assert await broker.fleet.acquire_leader_lease("a", 60_000) == 1
    await broker.fleet.release_leader_lease("b")
    assert await broker.fleet.acquire_leader_lease("b", 60_000) is None
    await broker.fleet.release_leader_lease("a")
    assert await broker.fleet.acquire_leader_lease("b", 60_000) == 2


async def test_a_manager_that_died_is_followed_after_its_lease(broker: Broker) -> None:
    """The lease runs out on the server's clock; who comes back stands by."""
    assert await broker.fleet.acquire_leader_lease("a", 30) == 1
    await asyncio.sleep(0.05)
    assert await broker.fleet.acquire_leader_lease("b", 5_000) == 2
    assert await broker.fleet.acquire_leader_lease("a", 5_000) is None


async def test_returning_to_an_expired_lease_is_a_new_reign(broker: Broker) -> None:
    """After a gap somebody else may have acted: the same Manager gets a higher term."""
    assert await broker.fleet.acquire_leader_lease("a", 20) == 1
    await asyncio.sleep(0.04)
    assert await broker.fleet.acquire_leader_lease("a", 5_000) == 2


@pytest.mark.parametrize(
    "term", [str(1 << 40), str((1 << 40) + 1), str(1 << 63), "1e308", "-1", "1.5", "nan", "inf", "x", ""]
)
async def test_a_poisoned_term_is_begun_again(broker: Broker, client: Any, term: str) -> None:
    """[A2] A store whose term an older version took from a message, or that holds no count at all: a Manager acts on
    it at once, in a term that workers can say, and keeps it."""
    await client.hset(MANAGER, mapping={"holder": "gone", "term": term, "until": "0"})
    assert await broker.fleet.acquire_leader_lease("a", 5_000) == 1
    assert await broker.fleet.acquire_leader_lease("a", 5_000) == 1
    await broker.fleet.release_leader_lease("a")
    assert await broker.fleet.acquire_leader_lease("b", 5_000) == 2


async def test_a_term_poisoned_under_its_holder_is_begun_again(broker: Broker, client: Any) -> None:
    """[A2] The same while a Manager acts: it goes on, in another term."""
    assert await broker.fleet.acquire_leader_lease("a", 5_000) == 1
    await client.hset(MANAGER, "term", 1 << 63)
    assert await broker.fleet.acquire_leader_lease("a", 5_000) == 1
    await client.hset(MANAGER, "until", "9" * 5_000)
    assert await broker.fleet.leader_lease_until() == 0


async def test_the_registry_survives_its_manager(broker: Broker) -> None:
    """What one Manager saved, the next one loads; who is gone is gone."""
    first, second = info("w-1", models=["m"], slots=4, engine=EngineState.READY), info("w-2")
    await broker.fleet.save_workers([first, second], [])
    assert await broker.fleet.load_workers() == {"w-1": first, "w-2": second}
    changed = first.model_copy(update={"running": 3})
    await broker.fleet.save_workers([changed], ["w-2"])
    assert await broker.fleet.load_workers() == {"w-1": changed}
    await broker.fleet.save_workers([], [])
    await broker.fleet.save_workers([], ["never-there"])
    assert await broker.fleet.load_workers() == {"w-1": changed}


async def test_sets_of_adapters_are_kept_by_name(broker: Broker, client: Any) -> None:
    """Many workers have one; what is garbage, or not what its name says, is left out."""
    sets = {adapter_set_of(names): frozenset(names) for names in (["x", "ä/y"], ["z"])}
    first, second = sets
    await broker.fleet.save_adapter_sets(sets, [])
    assert await broker.fleet.load_adapter_sets() == sets
    assert await broker.fleet.load_adapter_sets([second, "0" * 32]) == {second: frozenset({"z"})}
    assert await broker.fleet.load_adapter_sets([]) == {}
    garbage = {
        "0" * 32: "[]", "1" * 32: '["x"]', "2" * 32: "{", "3" * 32: "[" * 10_000, "4" * 32: "7", b"\xff": "[]",
        "5" * 32: '["\\ud800"]', "6" * 32: b"\xff",
    }  # fmt: skip
    await client.hset(ADAPTERS, mapping=garbage)
    assert await broker.fleet.load_adapter_sets() == sets
    assert await broker.fleet.load_adapter_sets(["1" * 32, first]) == {first: sets[first]}
    await broker.fleet.save_adapter_sets({}, [first, "never-there"])
    assert await broker.fleet.load_adapter_sets() == {second: sets[second]}


async def test_an_entry_that_cannot_be_read_is_left_out(broker: Broker, client: Any) -> None:
    """What another version wrote costs the Manager that entry, not its start."""
    known = info("w-1")
    await broker.fleet.save_workers([known], [])
    await client.hset(WORKERS, mapping={"w-2": "{", "w-3": "{}"})
    assert await broker.fleet.load_workers() == {"w-1": known}


async def test_pools_are_remembered(broker: Broker) -> None:
    """Declared pools and those seen within a day are known, also without any worker."""
    await broker.known_pools.remember(["declared"], declared=True)
    await broker.known_pools.remember(["seen", "sim/ä:{x}"])
    assert (await broker.known_pools.remembered()).known == {"declared": True, "seen": False, "sim/ä:{x}": False}
    await broker.known_pools.remember([])


async def test_pools_not_seen_for_a_day_are_forgotten(broker: Broker, client: Any) -> None:
    """The memory of a pool that nobody declared ends, and leaves nothing."""
    await broker.known_pools.remember(["declared"], declared=True)
    await client.hset(POOLS, mapping={"seen:old": 0, "declared:older": 0})
    assert (await broker.known_pools.remembered()).known == {"declared": True}
    assert await client.hkeys(POOLS) == [b"declared:declared"]


async def test_one_autoscaler_acts_for_a_pool(broker: Broker, client: Any) -> None:
    """Another gets it when the first gives it up; pools do not disturb each other. The pool is declared by that."""
    assert await broker.known_pools.claim("m", "a", 60_000)
    assert await broker.known_pools.claim("m", "a", 60_000)
    assert not await broker.known_pools.claim("m", "b", 60_000)
    assert await broker.known_pools.claim("n", "b", 60_000)
    assert await broker.known_pools.remembered() == RememberedPools({"m": True, "n": True}, frozenset({"m", "n"}))
    assert not await broker.known_pools.claim("m", "b", 0)
    assert "m" in (await broker.known_pools.remembered()).scaled, "another's claim is not b's to give up"
    assert not await broker.known_pools.claim("m", "a", 0)
    assert await broker.known_pools.remembered() == RememberedPools({"m": True, "n": True}, frozenset({"n"}))
    assert await broker.known_pools.claim("m", "b", 60_000)
    assert 0 < await client.pttl(autoscaler_key("m")) <= POOL_MEMORY_MS


async def test_an_autoscaler_that_is_gone_is_responsible_for_a_minute(broker: Broker, client: Any) -> None:
    """Its claim lapses, and so does what it promised; the pool stays declared for a day."""
    assert await broker.known_pools.claim("m", "a", 1)
    await eventually(lambda: broker.known_pools.claim("m", "b", 60_000), "the claim lapses")
    await client.hset(POOLS, "scaled:m", 0)
    assert await broker.known_pools.remembered() == RememberedPools({"m": True})
    assert await client.hkeys(POOLS) == [b"declared:m"]


async def test_being_served_does_not_end_a_declaration(broker: Broker, client: Any) -> None:
    """One role's declaration stands while another only remembers; when it is a day old, the pool is like any other."""
    await broker.known_pools.remember(["m"], declared=True)
    await broker.known_pools.remember(["m"])
    assert (await broker.known_pools.remembered()).known == {"m": True}
    await client.hset(POOLS, "declared:m", 0)
    assert (await broker.known_pools.remembered()).known == {"m": False}


async def test_the_acting_manager_says_where_it_is(broker: Broker) -> None:
    """[A7] Address and proof stand with the lease and are its holder's: the next one replaces them, and a lease that
    was given up says that nobody acts."""
    assert await broker.fleet.acting_manager() == ActingManager()
    assert await broker.fleet.acquire_leader_lease("a", 60_000, "http://a:9000", "proof of a") == 1
    said = await broker.fleet.acting_manager()
    assert (said.manager_id, said.url, said.proof) == ("a", "http://a:9000", "proof of a")
    assert said.renewal_count > 0
    assert await broker.fleet.acquire_leader_lease("b", 60_000, "http://b:9000", "proof of b") is None
    assert (await broker.fleet.acting_manager()).url == "http://a:9000"
    await broker.fleet.release_leader_lease("a")
    assert (await broker.fleet.acting_manager()).renewal_count == 0
    assert await broker.fleet.acquire_leader_lease("b", 60_000) == 2
    said = await broker.fleet.acting_manager()
    assert (said.manager_id, said.url, said.proof) == ("b", "", "")
