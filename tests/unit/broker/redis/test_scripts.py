"""Scripts are composed of the libraries that they name, in an order in which each has what it needs."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from broker.redis.scripts import compose, load_scripts

LIBRARIES = {"shard": "local P\n", "queue": "-- uses: shard\n", "fence": "-- uses: queue, shard\n"}
MAX_CODE_LINES = 1_640


def test_a_script_gets_what_it_uses_and_no_more() -> None:
    """Its libraries, those that they use before them, each once, then itself."""
    assert list(compose("settle", "-- uses: fence\n", LIBRARIES)) == ["shard", "queue", "fence", "settle"]
    assert list(compose("join", "-- uses: shard\n", LIBRARIES)) == ["shard", "join"]
    assert list(compose("ping", "return 1\n", LIBRARIES)) == ["ping"]


def test_an_unknown_library_is_named() -> None:
    """With the file that asks for it, and those that there are."""
    with pytest.raises(ValueError, match="settle uses fense, which is no library; there are fence, queue, shard"):
        compose("settle", "-- uses: fense\n", LIBRARIES)


def test_libraries_that_need_each_other_are_refused() -> None:
    """With the way round."""
    with pytest.raises(ValueError, match="settle -> a -> b -> a: libraries of broker/lua/lib need each other"):
        compose("settle", "-- uses: a\n", {"a": "-- uses: b\n", "b": "-- uses: a\n"})


def test_every_library_is_used() -> None:
    """None is left over."""
    used = {part for script in load_scripts(flags=False).values() for part in script.parts}
    assert {entry.name.removesuffix(".lua") for entry in (files("broker") / "lua" / "lib").iterdir()} <= used


@pytest.mark.parametrize("name", load_scripts(flags=False))
def test_every_script_says_what_it_takes_answers_and_keeps(name: str) -> None:
    """Its header: a first line that begins with a verb, ARGV, Reply."""
    text = (files("broker") / "lua" / f"{name}.lua").read_text("utf-8")
    header = re.match(r"(?:--.*\n)+", text)
    assert header
    assert re.match(r"-- [A-Z][a-z]+ ?", header[0])
    assert "ARGV:" in header[0]
    assert "Reply:" in header[0]


def test_the_scripts_stay_small() -> None:
    """All Lua together, without comments and blank lines."""
    folder = files("broker") / "lua"
    texts = [
        entry.read_text("utf-8")
        for part in (folder, folder / "lib")
        for entry in part.iterdir()
        if entry.name.endswith(".lua")
    ]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    assert len([line for line in lines if line and not line.startswith("--")]) <= MAX_CODE_LINES
