"""Ids and key names: what is accepted, what it means, and that no two things share a key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from queue_schemas import (
    BANDS,
    LANES,
    BadMessage,
    Lane,
    ShardKeys,
    check_region,
    check_worker_id,
    keys,
    new_job_id,
    new_session_id,
    shard_of_job,
    shard_of_pool,
)
from queue_schemas.ids import MAX_NAME_BYTES, check_name, check_session_id, decode_name, encode_name

names = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn")), min_size=1, max_size=30)
tricky = names | st.sampled_from(["a", "a:b", "a:b:c", "{0}", "}", "%", "%3A", "*", "a%3Ab", "interactive", "0", "ü:ß"])


@given(st.integers(0, 1023))
def test_a_job_id_knows_its_shard(shard: int) -> None:
    """Whoever holds an id can address the job; no two ids are the same."""
    job_id = new_job_id(shard)
    assert shard_of_job(job_id) == shard
    assert new_job_id(shard) != job_id


@pytest.mark.parametrize(
    "text",
    ["", "0", "0-", "x-" + "0" * 32, "00-" + "0" * 32, "0-" + "0" * 31, "0-" + "0" * 33, "0-" + "G" * 32,
     "-1-" + "0" * 32, "0-" + "0" * 32 + "\n", "10000-" + "0" * 32],
)  # fmt: skip
def test_what_is_no_job_id_is_refused(text: str) -> None:
    """Nothing that a client can make up reaches a key."""
    with pytest.raises(BadMessage):
        shard_of_job(text)


def test_pools_have_the_same_home_in_every_process() -> None:
    """The shard of a pool is CRC-32 of its name, so that other languages find it too."""
    assert [shard_of_pool(pool, 8) for pool in ("a", "org/model-8B", "ü")] == [3, 7, 5]
    assert shard_of_pool("anything", 1) == 0


@given(tricky)
def test_names_survive_encoding(name: str) -> None:
    """A name inside a key holds no separator and no brace, and comes back."""
    part = encode_name(name)
    assert not set(part) & set(":{}* \n")
    assert decode_name(part) == name


@pytest.mark.parametrize(
    "name", ["", "a\nb", "a\x00", "x" * (MAX_NAME_BYTES + 1), "ü" * (MAX_NAME_BYTES // 2 + 1), "\ud800"]
)
def test_a_name_that_cannot_be_is_refused(name: str) -> None:
    """Empty, too long in bytes, or with control characters."""
    with pytest.raises(BadMessage):
        check_name(name, "model")


@pytest.mark.parametrize("region", ["", "eu-west", "a:b@c {d} ü%", "x" * 100])
def test_regions_that_may_be(region: str) -> None:
    """Printable text; in a key nothing of it can be taken for the key's own marks. Empty is no region."""
    assert check_region(region) == region
    assert not set(encode_name(region)) & set(":@{} ")
    assert decode_name(encode_name(region)) == region


@pytest.mark.parametrize("region", ["a\nb", "\x00", "x" * 101, "\ud800"])
def test_a_region_that_cannot_be_is_refused(region: str) -> None:
    """Too long, or with what cannot be printed."""
    with pytest.raises(BadMessage, match="region must be at most 100 characters"):
        check_region(region)


@pytest.mark.parametrize(("region", "suffix"), [("", ""), ("eu west", "@eu%20west"), ("a@b:c", "@a%40b%3Ac")])
def test_a_place_is_a_pools_lane_and_perhaps_a_region(region: str, suffix: str) -> None:
    """Without a region the keys are those of a fabric that knows none."""
    assert keys.queue_key("m:1", Lane.BATCH, region) == f"m%3A1:batch{suffix}"


@pytest.mark.parametrize("worker_id", ["worker-1", "a", "A.b_c-9", "9", "x" * 63])
def test_worker_ids_that_may_be(worker_id: str) -> None:
    """Letters, digits, dot, underscore, dash."""
    assert check_worker_id(worker_id) == worker_id
    assert check_session_id(new_session_id(worker_id)).startswith(f"{worker_id}.")


@pytest.mark.parametrize("worker_id", ["", "-a", ".a", "a b", "a/b", "a:b", "x" * 64, "ü", "a\n", "../x"])
def test_worker_ids_that_may_not_be(worker_id: str) -> None:
    """The error says the rule."""
    with pytest.raises(BadMessage, match="use 1 to 63 letters"):
        check_worker_id(worker_id)


@pytest.mark.parametrize("text", ["w", "w.", "w.123", "w.00112233445566778", "w.001122334455667G", ".0011223344556677"])
def test_what_is_no_incarnation_is_refused(text: str) -> None:
    """A name, a dot and 16 hex digits."""
    with pytest.raises(BadMessage):
        check_session_id(text)


places = st.tuples(tricky, st.sampled_from(LANES), st.integers(0, BANDS - 1), tricky, st.just("") | tricky)


def all_keys(shard: int, pool: str, lane: Lane, band: int, tenant: str, region: str, ident: str) -> dict[str, str]:
    """Every key that these names can form, by what it is for."""
    keys = ShardKeys(shard)
    return {
        f"queue {pool!r} {lane} {band} {tenant!r} {region!r}": keys.queue(pool, lane, band, tenant, region),
        f"retry {pool!r} {lane}": keys.retry(pool, lane),
        f"active {pool!r} {lane} {band} {region!r}": keys.active(pool, lane, band, region),
        f"service {pool!r} {lane} {band} {region!r}": keys.service(pool, lane, band, region),
        f"parked {pool!r} {lane} {region!r}": keys.parked(pool, lane, region),
        f"offers {pool!r} {lane} {region!r}": keys.offers(pool, lane, region),
        f"job {ident}": keys.job(ident),
        f"leases {ident}": keys.leases(ident),
        f"claimed {ident}": keys.claimed(ident),
        f"control {ident}": keys.control(ident),
        f"reply {ident}": keys.reply(ident),
        f"out {ident}": keys.out(ident),
        f"dead request {ident}": keys.dead_request(ident),
        f"listeners {ident}": keys.listeners(ident),
        f"idempotency {ident}": keys.idempotency(ident),
        "persisted": keys.persisted,
        "renewals": keys.renewals,
        "deadlines": keys.deadlines,
        "dead": keys.dead,
        "budget": keys.budget,
        "counters": keys.counters,
    }


@given(places, places, st.sampled_from(["w.0011223344556677", "dead", "0-" + "0" * 32]))
def test_no_two_different_things_share_a_key(
    one: tuple[str, Lane, int, str, str], other: tuple[str, Lane, int, str, str], ident: str
) -> None:
    """Whatever models and tenants are called, different places have different keys, and equal ones the same."""
    meaning: dict[str, str] = {}
    for place in (one, other):
        for what, key in all_keys(0, *place, ident).items():
            assert meaning.setdefault(key, what) == what
    assert len(set(meaning.values())) == len(meaning)


@given(places)
def test_every_key_of_a_shard_carries_its_hash_tag(place: tuple[str, Lane, int, str, str]) -> None:
    """All keys of a shard share one Cluster slot: the first braces of each hold the shard, whatever the names hold."""
    for key in all_keys(17, *place, "w.0011223344556677").values():
        assert key.startswith("iq:{17}:")
        assert key[key.index("{") + 1 : key.index("}")] == "17"
