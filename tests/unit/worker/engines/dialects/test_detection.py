"""Which engine a server is, by its own pages."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from queue_schemas import EngineFailed
from tests.support.engines import FAKES, FakeLlamacpp, recorded
from tests.support.engines.attached import attached
from worker.engines.choice import make_engine
from worker.engines.dialects import DIALECTS, OPENAI, find_dialect
from worker.settings import WorkerSettings


def owners_of(engine: str) -> dict[str, object]:
    listed = json.loads(recorded(engine, "models.json"))["data"]
    return {model["id"]: model["owned_by"] for model in listed}


async def found(owners: Mapping[str, object], pages: Mapping[str, bytes] | None = None) -> tuple[str, list[str]]:
    """The dialect's name, and the pages that were asked for."""
    asked = []

    async def get(path: str) -> tuple[int, bytes]:
        asked.append(path)
        body = (pages or {}).get(path)
        return (404, b"") if body is None else (200, body)

    return (await find_dialect(owners, get)).name, asked


@pytest.mark.parametrize(
    ("engine", "page", "name"),
    [
        ("llamacpp", "", ""),
        ("sglang", "", ""),
        ("tgi", "/info", "info.json"),
        ("ollama", "/api/version", "version.json"),
    ],
)
async def test_each_engine_is_known_by_its_own_answers(engine: str, page: str, name: str) -> None:
    """One look, and a second one only where the list is no proof."""
    pages = {page: recorded(engine, name)} if page else {}
    assert await found(owners_of(engine), pages) == (engine, [page] if page else [])
    assert (await found(owners_of(engine)))[0] == ("openai" if page else engine)


async def test_vllm_is_known_with_its_adapters() -> None:
    """All that it lists is its own."""
    assert await found({"base": "vllm", "tuned": "vllm"}) == ("vllm", [])


@pytest.mark.parametrize(
    "owners",
    [
        {},
        {"m": None},
        {"m": "me"},
        {"m": "openai"},
        {"a": "vllm", "b": "sglang"},
        {"a": "vllm", "b": "library"},
        {"org/model": "organization_owner"},
        {"m": ["vllm"]},
    ],
    ids=str,
)
async def test_what_is_not_certain_is_a_server_that_is_not_known_and_is_asked_nothing(
    owners: dict[str, object],
) -> None:
    """llama-cpp-python's among them, which ends a running stream for the next request; and proxies before several
    engines."""
    assert await found(owners, {"/info": recorded("tgi", "info.json")}) == ("openai", [])


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"router": 1}', b'{"router": "another"}', b"[" * 100_000])
async def test_another_page_than_the_engines_proves_nothing(body: bytes) -> None:
    """A page of that name is not enough."""
    assert (await found({"m": "m"}, {"/info": body}))[0] == "openai"
    assert (await found({"m": "library"}, {"/api/version": body}))[0] == "openai"


async def test_a_page_that_does_not_come_proves_nothing() -> None:
    """The server is served as any other."""

    async def away(_path: str) -> tuple[int, bytes]:
        raise EngineFailed("away")

    async def late(_path: str) -> tuple[int, bytes]:
        raise TimeoutError

    assert await find_dialect({"m": "library"}, away) is OPENAI
    assert await find_dialect({"m": "m"}, late) is OPENAI


async def test_the_setting_says_it_where_the_pages_do_not() -> None:
    """Every name of the setting is a dialect, but for the one that has it found."""
    names = WorkerSettings.model_fields["engine_dialect"].annotation
    assert set(names.__args__) == {"auto", *DIALECTS}  # type: ignore[union-attr]
    assert {*FAKES, "vllm", "openai"} == set(DIALECTS)
    for name in ("auto", "tgi"):
        engine = make_engine(WorkerSettings.load(engine_url="http://127.0.0.1:1", engine_dialect=name))
        assert engine.dialect is DIALECTS.get(name, OPENAI)
    async with attached(FakeLlamacpp(), DIALECTS["openai"]) as engine:
        assert engine.dialect is OPENAI
