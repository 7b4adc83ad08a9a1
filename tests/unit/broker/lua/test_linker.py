"""A call of a script builds the functions that it needs: those seldom used at their first use, others not at all."""

from __future__ import annotations

import fakeredis
import pytest

from broker.lua.linker import link
from broker.redis.scripts import load_scripts

LIBRARY = """
-- rarely: repair
local seen = {}
local function note(what) -- mentions count, but not those in strings: 'unused'
  seen[#seen + 1] = what
end
local function unused()
  return note('never')
end
local function mend(what)
  note('mended ' .. what)
end
local function repair(what)
  mend(what)
  return 'repaired ' .. what
end
local function check(what)
  if what == 'broken' then return repair(what) end
  note(what)
  return what
end
"""
SCRIPT = "local answers = { check(ARGV[1]), check(ARGV[2]) }\nreturn { answers[1], answers[2], unpack(seen) }\n"


def test_what_is_not_used_is_left_out() -> None:
    """However it is mentioned in strings or comments."""
    source = link("look", {"lib": LIBRARY, "look": SCRIPT})
    assert "unused" not in source.replace("'unused'", "")
    assert "repair" not in link("look", {"lib": LIBRARY, "look": "note(ARGV[1])\nreturn seen\n"})


@pytest.mark.parametrize(
    ("first", "second", "answer"),
    [
        ("a", "b", [b"a", b"b", b"a", b"b"]),
        ("broken", "b", [b"repaired broken", b"b", b"mended broken", b"b"]),
        ("broken", "broken", [b"repaired broken"] * 2 + [b"mended broken"] * 2),
    ],
)
def test_what_is_seldom_used_shares_the_state_of_the_rest(first: str, second: str, answer: list[bytes]) -> None:
    """Whether it is made at all, and when."""
    source = link("look", {"lib": LIBRARY, "look": SCRIPT})
    assert source.index("rarely = function") < source.index("local function mend")
    assert fakeredis.FakeRedis().eval(source, 0, first, second) == answer


def test_a_function_is_not_called_before_it_can_be_made() -> None:
    """A script whose order does not allow it is refused."""
    early = "-- rarely: late\ncheck(ARGV[1])\nlocal function late()\n  return 1\nend\nreturn late()\n"
    with pytest.raises(ValueError, match="look uses a function that is rarely used before"):
        link("look", {"lib": LIBRARY, "look": early})


def test_settling_an_answer_builds_little() -> None:
    """What happens to a lost attempt or to persisted output stands within the function that is not called."""
    source = load_scripts(flags=False)["settle"].source
    rarely = source[source.index("rarely = function") : source.index("return rare_functions[name]")]
    assert "local function retry_or_end(job" in rarely
    assert "local function keep_or_drop_output(job" in rarely
    assert source.replace(rarely, "").count("local function") <= 39
