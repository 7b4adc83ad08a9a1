"""Pages of lists, as OpenAI's API answers them."""

from __future__ import annotations

from openai_api.pages import Page, page_of


def test_a_page_names_its_first_and_last_object() -> None:
    """Clients go on behind ``last_id``."""
    page = page_of([{"id": "a"}, {"id": "b"}], has_more=True)
    assert page == {
        "object": "list",
        "data": [{"id": "a"}, {"id": "b"}],
        "first_id": "a",
        "last_id": "b",
        "has_more": True,
    }
    assert Page[dict[str, str]].model_validate(page).model_dump() == page


def test_an_empty_page_names_none() -> None:
    """Unless the list goes on behind an object that was not shown."""
    assert (
        page_of([], has_more=False) | {"data": []}
        == Page[int](data=[], first_id=None, last_id=None, has_more=False).model_dump()
    )
    assert page_of([], has_more=True, last_id="c")["last_id"] == "c"
