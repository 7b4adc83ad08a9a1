"""The error tree: what is drawn is what there is, and a client can read every error."""

from __future__ import annotations

import json
import re

import pytest

from queue_schemas import InferqError, errors


def all_errors(root: type[InferqError] = InferqError) -> list[type[InferqError]]:
    """The classes below ``root`` that the product defines, ``root`` excluded, depth first."""
    found: list[type[InferqError]] = []
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            found += [child, *all_errors(child)]
    return found


ERRORS = all_errors()
_LINE = re.compile(r"^    (?P<indent>[| ]*)\+-- (?P<name>\w+) +(?P<status>\d{3})  (?P<code>\w+)", re.MULTILINE)


def test_the_drawn_tree_is_the_tree() -> None:
    """Names, parents, statuses and codes in the module's docstring are those of the classes."""
    drawn: dict[str, tuple[str, int, str]] = {}
    parents = ["InferqError"]
    for line in _LINE.finditer(errors.__doc__ or ""):
        depth = len(line["indent"]) // 4
        del parents[depth + 1 :]
        drawn[line["name"]] = (parents[depth], int(line["status"]), line["code"])
        parents.append(line["name"])
    assert drawn == {error.__name__: (error.__bases__[0].__name__, error.status, error.code) for error in ERRORS}


def test_codes_are_unique() -> None:
    """A client can tell errors apart by their code."""
    assert len({error.code for error in ERRORS}) == len(ERRORS)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_is_the_object_that_clients_expect(error: type[InferqError]) -> None:
    """All four keys, valid JSON, and text that cannot break it."""
    body = json.loads(error('say "what"\nto do \ud800 ü', param="model").body())
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == error.code
    assert body["error"]["param"] == "model"
    assert body["error"]["message"].startswith('say "what"\nto do')


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_only_what_may_succeed_later_is_retryable(error: type[InferqError]) -> None:
    """Client mistakes are not worth repeating; overload and outages are."""
    assert 400 <= error.status < 600
    if error.status in (429, 503):
        assert error.retryable
    if error.status in (400, 401, 403, 404, 413):
        assert not error.retryable
