"""``docs/faults.md`` names, for each fault that was fixed, the tests that keep it fixed: those and no others."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
_ROW = re.compile(r"^\| ([A-H][0-9]{1,2}) \|", re.MULTILINE)
_TEST = re.compile(r"`([\w./]+)::(\w+)`")
_TAG = re.compile(r"\s*\[([A-H][0-9]{1,2}(?:, ?[A-H][0-9]{1,2})*)\] ")


def _documented() -> dict[str, set[str]]:
    """Each row of the page with the tests that it names."""
    rows: dict[str, set[str]] = {}
    for line in (ROOT / "docs" / "faults.md").read_text().splitlines():
        if found := _ROW.match(line):
            assert found[1] not in rows, f"{found[1]} stands twice"
            rows[found[1]] = {f"{path}::{name}" for path, name in _TEST.findall(line)}
    return rows


def _tagged() -> dict[str, set[str]]:
    """Each row with the tests whose docstring begins with its name in brackets."""
    rows: defaultdict[str, set[str]] = defaultdict(set)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for test, doc in _tests(path):
            if found := _TAG.match(doc):
                for row in re.split(", ?", found[1]):
                    rows[row].add(f"{path.relative_to(ROOT / 'tests')}::{test}")
    return dict(rows)


def _tests(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_"):
            yield node.name, ast.get_docstring(node) or ""


def test_every_fault_names_the_tests_that_keep_it_mended() -> None:
    """A row without a test is a claim; a test of a row that the page does not name is hidden."""
    documented, tagged = _documented(), _tagged()
    assert documented == tagged
    assert [row for row, tests in documented.items() if not tests] == []
