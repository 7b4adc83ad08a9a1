"""The product's modules stay small, its folders short, its imports free of cycles, and the code map true."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "inferq", "simulator", "router", "manager", "worker", "batches", "webhooks", "storage", "broker", "openai_api",
    "telemetry", "scheduling", "queue_schemas",
)  # fmt: skip
MAX_LINES = 400
MAX_MODULES = 15
"""In one folder, beside its ``__init__``."""
_MAP_ROW = re.compile(r"^\| `([a-z_/]+)/`", re.MULTILINE)


@cache
def modules() -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def folders() -> set[str]:
    """The folders that hold modules, scripts or data, as paths from the root."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.*") if path.is_file())
    return {path.parent.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_is_too_long(package: str) -> None:
    """A reader sees a module whole; about 250 lines is where to look for the seam."""
    long = {
        path.relative_to(ROOT).as_posix(): lines
        for name, path in modules().items()
        if name.split(".")[0] == package and (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert long == {}


@pytest.mark.parametrize("folder", sorted(folders()))
def test_no_folder_holds_too_many_modules(folder: str) -> None:
    """A folder is scanned at a glance."""
    held = sorted(path.name for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py")
    assert len(held) <= MAX_MODULES, held


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_have_no_cycle(package: str) -> None:
    """Each module of a package can be read, and imported, before those that import it. Imports for type checkers alone
    and those within functions do not count; a package's ``__init__`` stands for what it re-exports."""
    graph = {name: set(imports(name)) for name in modules() if name.split(".")[0] == package}
    assert cycle(graph) == []


def imports(name: str) -> Iterator[str]:
    """The modules of the same package that importing ``name`` imports by name."""
    path = modules()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in module_level(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            targets = [inner if (inner := f"{source}.{alias.name}") in modules() else source for alias in node.names]
        for target in targets:
            # A module imports its own package's __init__ first whatever it says: that is no choice of the module's.
            if target in modules() and target != name and not f"{name}.".startswith(f"{target}."):
                yield target


def module_level(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when the module is imported."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from module_level(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from module_level([part for part in ast.iter_child_nodes(node) if isinstance(part, ast.stmt)])


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """One cycle of ``graph``, empty if there is none."""
    done: set[str] = set()
    for start in graph:
        trail: list[str] = []
        pending = [(start, False)]
        while pending:
            name, left = pending.pop()
            if left:
                done.add(trail.pop())
            elif name in trail:
                return [*trail[trail.index(name) :], name]
            elif name not in done:
                trail.append(name)
                pending += [(name, True), *((target, False) for target in graph.get(name, ()))]
    return []


def test_a_cycle_is_found() -> None:
    """And is told from two ways to the same module."""
    assert cycle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) in (["b", "c", "b"], ["c", "b", "c"])


def test_the_code_map_names_every_folder() -> None:
    """ARCHITECTURE.md's table of folders is the tree's: none missing, none that is gone."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    section = re.search(r"^## Code map\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None, "ARCHITECTURE.md has no section 'Code map'"
    named = _MAP_ROW.findall(section[1])
    assert sorted(named) == sorted(folders())


CALLED_BY_LIBRARIES = frozenset(
    {
        "capture_signals", "connection_lost", "connection_made", "data_received", "eof_received", "pause_writing",
        "on_body", "on_broken_pipe", "on_headers_complete", "on_message_begin", "on_message_complete",
        "get_field_value", "settings_customise_sources", "procline", "send_webhooks", "resolve", "build",
        "check_health", "record_autoscaling_stats", "success_callback", "failure_callback", "stopped_callback",
    }
)  # fmt: skip
CONTRACT = ("queue_schemas/keys.py", "queue_schemas/lanes.py", "scheduling/affinity.py", "scheduling/preemption.py")
"""What the Lua scripts do, in Python: keys that only they use, and the orders that tests compare them with."""
_ROUTES = ["@routes.*", "@app.*", "@*.command*", "@*.callback*", "@field_validator", "@model_validator"]


def test_nothing_in_the_product_is_dead() -> None:
    """Every function, class, method, property and import is used by the product itself, not by its tests alone."""
    from vulture import Vulture  # noqa: PLC0415 - only this test needs it

    vulture = Vulture(ignore_decorators=_ROUTES)
    vulture.scavenge([str(ROOT / package) for package in PACKAGES])
    kinds = {"function", "class", "method", "property", "import", "unreachable_code"}
    dead = [
        f"{Path(item.filename).relative_to(ROOT)}:{item.first_lineno} {item.typ} {item.name}"
        for item in vulture.get_unused_code(min_confidence=60)
        if item.typ in kinds and item.name not in CALLED_BY_LIBRARIES and not str(item.filename).endswith(CONTRACT)
    ]
    assert dead == []


_REFERENCE = re.compile(r":(?:mod|func|class|meth|data|attr):`~?([a-z_]+(?:\.\w+)+)`")


@pytest.mark.parametrize("package", PACKAGES)
def test_references_in_docstrings_lead_somewhere(package: str) -> None:
    """A module that a docstring names exists, and the name in it stands there."""
    lost = [
        f"{path.relative_to(ROOT)}: {reference}"
        for name, path in modules().items()
        if name.split(".")[0] == package
        for reference in _REFERENCE.findall(path.read_text())
        if reference.split(".")[0] in PACKAGES and not resolves(reference)
    ]
    assert lost == []


def resolves(reference: str) -> bool:
    """Whether ``reference`` is a module, or a name in one."""
    parts = reference.split(".")
    for length in range(len(parts), 0, -1):
        path = modules().get(".".join(parts[:length]))
        if path is not None:
            return length == len(parts) or re.search(rf"\b{parts[length]}\b", path.read_text()) is not None
    return False
