"""Count the structure of a JSON text before it is parsed, to refuse what costs too much memory.

Objects, lists and texts cost memory and time each, however short they are; the length of a text costs next to nothing.
"""

from __future__ import annotations

MAX_NODES = 1_000_000
"""Objects, lists and texts (names included) in one JSON text; brackets within its texts count as well."""
MAX_COMMAS = 4_000_000
"""What bounds numbers and literals. Those within texts count as well."""
TOO_MUCH = f"more than {MAX_NODES} objects, lists and names and other texts, or more than {MAX_COMMAS} commas"


def has_too_much_structure(data: bytes) -> bool:
    """Whether ``data`` is beyond one of the bounds. Cheap: nothing is parsed, and what is short is not looked at.

    A text is two quotes. One behind a backslash is within a text, but for the quote that ends a text whose last
    character is a backslash itself: a text made so counts half.
    """
    if len(data) <= MAX_NODES:
        return False
    quotes = data.count(b'"') - data.count(b'\\"')
    nodes = data.count(b"[") + data.count(b"{") + quotes // 2
    return nodes > MAX_NODES or data.count(b",") > MAX_COMMAS
