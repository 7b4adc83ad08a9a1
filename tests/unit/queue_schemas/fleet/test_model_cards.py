"""What engines say of their models: bounded, the same at each look, and one card for a model of several workers."""

from __future__ import annotations

from typing import Any

from queue_schemas import WorkerInfo
from queue_schemas.fleet.model_cards import MAX_CARDS_BYTES, bounded_cards, card_of, merged_card

VLLM: dict[str, Any] = {
    "id": "org/model", "object": "model", "created": 1795538964, "owned_by": "vllm", "root": "/models/model",
    "parent": None, "max_model_len": 32768,
    "permission": [{"id": "modelperm-1", "object": "model_permission", "created": 1795538964, "allow_view": True}],
}  # fmt: skip


def test_a_card_is_the_same_at_each_look() -> None:
    """[C9] vLLM gives its list new dates and ids whenever it is asked: they are left out, all else stays."""
    later = VLLM | {"created": 1, "permission": [VLLM["permission"][0] | {"id": "modelperm-2", "created": 1}]}
    assert card_of(later) == card_of(VLLM) == {
        "owned_by": "vllm", "root": "/models/model", "parent": None, "max_model_len": 32768,
        "permission": [{"object": "model_permission", "allow_view": True}],
    }  # fmt: skip


def test_cards_are_bounded() -> None:
    """[C9] A huge card keeps what clients look for; a thousand adapters do not fill heartbeats."""
    assert card_of(VLLM | {"notes": "x" * 9_000})["max_model_len"] == 32768
    assert "notes" not in card_of(VLLM | {"notes": "x" * 9_000})
    assert card_of({"root": "x" * 9_000}) == {}
    many = bounded_cards({f"adapter-{n}": VLLM for n in range(1_000)})
    assert 100 < len(many) < 1_000
    assert sum(map(len, map(str, many.values()))) < 2 * MAX_CARDS_BYTES


def test_strange_cards_refuse_no_worker() -> None:
    """[C9] A worker whose engine says nonsense is a worker all the same."""
    for cards in (None, 3, [], {"m": 3}, {3: {}}, {"m": {"x": {1, 2}}}):
        assert set(bounded_cards(cards)) <= {"m"}
    strange = {"worker_id": "w", "session_id": "w." + "0" * 16, "cards": [1], "assignment": {"term": 1, "version": 1}}
    assert WorkerInfo.model_validate(strange).cards == {}


def test_workers_of_one_model_share_a_card() -> None:
    """[C9] With the length that fits all of them."""
    merged = merged_card([{"max_model_len": 8, "root": "a"}, {"max_model_len": 4, "root": "b", "x": 1}, {}])
    assert merged == {"max_model_len": 4, "root": "a", "x": 1}
    assert merged_card([]) == {}
