"""A page of a list as OpenAI's API answers ``GET`` on a collection; clients go on with ``after=last_id``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel

Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    """Some objects of a list. ``has_more``: there are others behind ``last_id``."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


def page_of(items: Sequence[dict[str, Any]], *, has_more: bool, last_id: str | None = None) -> dict[str, Any]:
    """The JSON of a page of ``items``, objects with an ``id``. ``last_id``: where to go on, if that is not the last of
    them."""
    return {
        "object": "list",
        "data": list(items),
        "first_id": items[0]["id"] if items else None,
        "last_id": last_id or (items[-1]["id"] if items else None),
        "has_more": has_more,
    }
