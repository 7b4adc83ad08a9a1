"""Digests of prefixes, the bounded table of who holds them, and the choices that follow."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from scheduling.affinity import (
    CHUNK_BYTES,
    DIGEST_CHARS,
    LOOKAHEAD,
    MAX_DIGESTS,
    MAX_HOLDERS,
    SAMPLED_CHUNKS,
    Match,
    WarmTable,
    adapter_digest,
    choose,
    holds,
    patience_ms,
    prefix_digests,
    request_affinity,
    split_digests,
    takes_warm,
)

SYSTEM = {"role": "system", "content": "You answer in one word. " * 200}


def chat(*turns: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(turns)]
    return {"messages": [SYSTEM, *messages], **fields}


def digests(request: dict[str, Any], tenant: str = "acme", model: str = "m", **options: Any) -> list[str]:
    return split_digests(prefix_digests(tenant, model, request, **options))


def test_the_next_turn_of_a_conversation_knows_its_last() -> None:
    """Every digest of a turn but that of its last, open chunk is one of the next turn's."""
    first = digests(chat("a" * 3_000))
    following = digests(chat("a" * 3_000, "b" * 2_000, "c" * 100))
    assert len(first) == 7
    assert following[-len(first) :] == first
    assert len(following) > len(first)


def test_what_is_not_the_prompt_changes_nothing() -> None:
    """Sampling parameters and the order of the body's fields."""
    plain = chat("a" * 3_000)
    assert digests(plain) == digests({"temperature": 0.7, "max_tokens": 9, **plain, "stream": True})
    tools = [{"type": "function", "function": {"name": "f", "description": "d" * 2_000}}]
    assert digests({"tools": tools, **plain}) == digests({**plain, "tools": tools})
    assert digests({"tools": tools, **plain})[-1] != digests(plain)[-1]


def test_tenants_and_models_share_no_digest() -> None:
    """Not even of one text, nor where the names run into each other."""
    request = chat("a" * 9_000)
    names = [("a", "bc"), ("ab", "c"), ("a", "b c"), ("a b", "c")]
    found = [set(digests(request, tenant, model, session="s")) for tenant, model in names]
    assert all(not one & other for one, other in itertools.combinations(found, 2))


def test_a_short_prompt_has_no_digest() -> None:
    """It costs nothing to compute."""
    assert prefix_digests("t", "m", {"messages": [{"role": "user", "content": "x" * 900}]}) == ""
    assert len(digests({"prompt": "x" * CHUNK_BYTES})) == 1


def test_a_small_body_is_not_read() -> None:
    """Unless it names a session."""
    small, large = {"prompt": "x" * 900}, {"prompt": "x" * 3_000}
    assert request_affinity("t", "m", large, 900, None) == ""
    assert request_affinity("t", "m", large, 3_000, None) == prefix_digests("t", "m", large) != ""
    assert request_affinity("t", "m", small, 900, b"s") == prefix_digests("t", "m", small, "s") != ""
    assert request_affinity("t", "m", {"prompt_cache_key": "s"}, 30, None) != ""
    assert request_affinity("", "m", large, 3_000, b"s") == ""


def test_what_cannot_be_written_again_has_no_digest() -> None:
    """A body of any depth that is read."""
    nested: Any = []
    for _ in range(600):
        nested = [nested]
    assert prefix_digests("t", "m", {"messages": nested}) == ""


@pytest.mark.parametrize("field", ["prompt", "input", "system", "instructions"])
def test_every_kind_of_prompt_counts(field: str) -> None:
    assert len(digests({field: "x" * 5_000})) == 4


def test_a_long_prompt_is_covered_with_few_digests() -> None:
    """The distance between two digests stays an eighth of what is before them."""
    assert len(digests({"prompt": "x" * 2_000_000}, session="s")) == MAX_DIGESTS - 1
    steps = [(b - a) / a for a, b in itertools.pairwise(SAMPLED_CHUNKS) if a >= 16]
    assert max(steps) <= 1 / 8
    assert SAMPLED_CHUNKS[-1] * CHUNK_BYTES > 800_000


def test_a_session_goes_before_every_prefix() -> None:
    """``prompt_cache_key`` counts as a session; what names one explicitly goes before it."""
    request = chat("a" * 3_000)
    plain = digests(request)
    named = digests(request, session="s")
    assert named[1:] == plain
    assert digests({**request, "prompt_cache_key": "s"}) == named
    assert digests({**request, "prompt_cache_key": "t"}, session="s") == named
    assert digests({**request, "prompt_cache_key": 7}) == plain
    assert digests({"prompt": "short"}, session="s") == named[:1]


def test_an_adapter_is_the_same_for_all_tenants() -> None:
    """It says what is loaded, not what was asked."""
    assert len(adapter_digest("one")) == DIGEST_CHARS
    assert adapter_digest("one") == adapter_digest("one") != adapter_digest("two")


def test_the_longest_known_prefix_is_found() -> None:
    table = WarmTable()
    short, long = prefix_digests("t", "m", chat("a" * 3_000)), prefix_digests("t", "m", chat("a" * 9_000))
    assert table.match(long) is None
    table.remember(short, "one")
    missing = (len(long) - len(short)) // DIGEST_CHARS
    assert table.match(long) == Match(("one",), missing, len(long) // DIGEST_CHARS)
    assert table.match(long, limit=missing) is None
    table.remember(long, "two")
    assert table.match(long) == Match(("two",), 0, len(long) // DIGEST_CHARS)
    assert table.match(short) == Match(("two", "one"), 0, len(short) // DIGEST_CHARS)


def test_the_latest_holders_are_remembered() -> None:
    table = WarmTable()
    for cache in ("a", "b", "c", "d", "e", "b"):
        table.remember("0" * DIGEST_CHARS, cache)
    found = table.match("0" * DIGEST_CHARS)
    assert found is not None
    assert found.holders == ("b", "e", "d", "c")
    assert len(found.holders) == MAX_HOLDERS


def test_a_cache_is_remembered_once() -> None:
    """Under the number that it had last."""
    table, digest = WarmTable(), "0" * DIGEST_CHARS
    for cache in ("a#1", "b#7", "a#2"):
        table.remember(digest, cache)
    found = table.match(digest)
    assert found is not None
    assert found.holders == ("a#2", "b#7")


def test_a_cache_holds_what_it_was_leased_under_its_last_two_numbers() -> None:
    assert [holds(("a#4", "b#6"), f"a#{number}") for number in (4, 5, 6)] == [True, True, False]
    assert not holds(("a#4",), "b#4")


def test_a_digest_in_the_slot_of_another_replaces_it() -> None:
    """The table never has more slots than digests have beginnings, whatever is sent."""
    table = WarmTable()
    table.remember("aaa000000000", "one")
    assert table.match("aaa111111111") is None
    table.remember("aaa111111111", "two")
    assert table.match("aaa000000000") is None
    assert len(table.slots) == 1


@pytest.mark.parametrize(
    ("passed", "free", "most_free", "taken"),
    [(0, 4, 8, True), (0, 3, 8, False), (0, 1, 2, True), (0, 1, 3, True), (0, 1, 4, False), (5, 6, 8, True),
     (5, 5, 8, False), (9, 7, 8, True), (9, 6, 8, False), (9, 1, 2, True), (0, 0, 1, False)],
)  # fmt: skip
def test_the_more_is_warm_the_more_load_is_accepted(passed: int, free: int, most_free: int, taken: bool) -> None:
    """Half of the free slots for all of the prompt, all but one for a tenth of it."""
    assert takes_warm(Match(("w",), passed, 10), free, 8, most_free, 8) is taken


def test_a_worker_takes_what_is_warm_here_then_what_is_warm_nowhere() -> None:
    table = WarmTable()
    mine, theirs, new = "m" * DIGEST_CHARS, "t" * DIGEST_CHARS, "n" * DIGEST_CHARS
    table.remember(mine, "here#0")
    table.remember(theirs, "there#0")
    assert choose(table, [theirs, new, mine], "here#0") == 2
    assert choose(table, [theirs, theirs, new], "here#0") == 2
    assert choose(table, [theirs, ""], "here#0") == 1
    assert choose(table, [theirs, theirs], "here#0") == 0
    assert choose(table, [theirs] * LOOKAHEAD + [mine], "here#0") == 0


def test_patience_is_the_longest_wait_of_late() -> None:
    """It rises at once, and fades with the jobs that wait less; where nobody waited there is none."""
    assert patience_ms(0, 800) == 0
    patience = patience_ms(1, 800)
    assert patience == 800
    assert patience_ms(patience, 500) < patience
    assert patience_ms(patience, 900) == 900
    for _ in range(128):
        patience = patience_ms(patience, 0)
    assert 200 < patience < 400
    for _ in range(2_000):
        patience = patience_ms(patience, 0)
    assert patience == 1
