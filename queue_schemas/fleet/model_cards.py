"""Model cards: the entries of an engine's ``/v1/models`` (``max_model_len``, ``root``, ``parent``, ...), bounded.

Workers register them and Routers show them, without the fields that change at each call (vLLM makes up ids and dates).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import orjson

MAX_CARD_BYTES = 2 * 1024
MAX_CARDS_BYTES = 64 * 1024
"""Of all models of a worker: it is sent with each heartbeat. Models beyond it have no card."""
_OURS = frozenset({"id", "object", "created", "hint"})
_SHORT = ("owned_by", "root", "parent", "max_model_len")

Card = dict[str, Any]


def card_of(model: Mapping[str, Any]) -> Card:
    """The card in one entry of an engine's list; of one that is too large, the best known fields."""
    card = {str(name): value for name, value in model.items() if name not in _OURS}
    permissions = card.get("permission")
    if type(permissions) is list:
        card["permission"] = [
            {name: value for name, value in one.items() if name not in ("id", "created")}
            for one in permissions
            if type(one) is dict
        ]
    if _size(card) <= MAX_CARD_BYTES:
        return card
    short = {name: card[name] for name in _SHORT if name in card and type(card[name]) in (str, int, type(None))}
    return short if _size(short) <= MAX_CARD_BYTES else {}


def bounded_cards(cards: Any) -> dict[str, Card]:
    """Cards out of a message that another process wrote: those that fit."""
    kept: dict[str, Card] = {}
    size = 0
    for model, card in cards.items() if type(cards) is dict else ():
        if type(model) is not str or type(card) is not dict:
            continue
        known = card_of(card)
        size += len(model) + _size(known)
        if size > MAX_CARDS_BYTES:
            break
        kept[model] = known
    return kept


def merged_card(cards: Iterable[Mapping[str, Any]]) -> Card:
    """One card for a model that several workers serve: the first one's, with the least ``max_model_len``, so that what
    fits it fits all."""
    merged: Card = {}
    for card in cards:
        lengths = [length for length in (merged.get("max_model_len"), card.get("max_model_len")) if type(length) is int]
        merged = {**card, **merged}
        if lengths:
            merged["max_model_len"] = min(lengths)
    return merged


def _size(card: Card) -> int:
    try:
        return len(orjson.dumps(card))
    except (TypeError, orjson.JSONEncodeError):
        return MAX_CARDS_BYTES + 1
