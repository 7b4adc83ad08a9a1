"""The documents of the repository lead somewhere, and its compose file starts what it says."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from typer.testing import CliRunner

import batches.service
import manager.service
import router.service
import webhooks.service
import worker.service
from inferq.cli import app
from telemetry import reporting

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
ROLES = {
    "manager": manager.service,
    "router": router.service,
    "worker": worker.service,
    "batcher": batches.service,
    "notifier": webhooks.service,
}
OURS = sorted(name for name, service in COMPOSE.items() if service["command"][0] in ROLES)

_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_PROOF = re.compile(r"`([a-z]\w*/[\w/]*\.py)(?:::(\w+))?`")
_SOURCE = re.compile(r"`([a-z]\w*/[\w/]*\.(?:py|lua))(?:::\w+)?`")
_LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)


def _documents() -> list[Path]:
    """Every document that is the repository's own, whether committed yet or not."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):  # an archive without its history
        return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
    return sorted(ROOT / name for name in listed if name and (ROOT / name).exists())


def _links(text: str) -> Iterator[str]:
    """The targets of a document's links, code aside."""
    for found in _LINK.finditer(_CODE.sub("", _FENCE.sub("", text))):
        yield found[1] or found[2]


def _anchors(document: Path) -> set[str]:
    """What a link may name after ``#``: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+\s+(.*?)\s*#*$", _FENCE.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_are_found_outside_of_code_only() -> None:
    """A link in a listing is an example, not a promise."""
    text = "[a](b.md) `[c](d.md)`\n```\n[e](f.md)\n```\n[g](<h i.md> 'title')\n\n[j]: k.md#l\n"
    assert list(_links(text.replace("h i", "h"))) == ["b.md", "h.md", "k.md#l"]


@pytest.mark.parametrize("document", _documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_exists(document: Path) -> None:
    """Files, folders and headings that a document points to are there, and within the repository."""
    broken = []
    for link in _links(document.read_text()):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (document.parent / name).resolve() if name else document
        inside = target.is_relative_to(ROOT) and target.exists()
        if not inside or (anchor and target.suffix == ".md" and anchor not in _anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_promise_names_tests_that_exist() -> None:
    """Each row of the guarantees names a test, by its file or by file and function, which is there."""
    promises = (ROOT / "GUARANTEES.md").read_text().partition("## What can still be lost")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| **")]
    assert rows
    unproved = [row for row in rows if not _PROOF.search(row.rpartition(" | ")[2])]
    missing = [f"{path}::{name}" for path, name in _PROOF.findall(promises) if not _is_test(path, name)]
    assert (unproved, missing) == ([], [])


def _is_test(path: str, name: str) -> bool:
    file = ROOT / "tests" / path
    return file.is_file() and (not name or re.search(rf"def {name}\(", file.read_text()) is not None)


def test_every_path_of_the_source_that_a_document_names_exists() -> None:
    """Modules, scripts and tests in the text of the documents, relative to the root or to ``tests/``."""
    missing = [
        f"{document.relative_to(ROOT)}: {path}"
        for document in _documents()
        for path in _SOURCE.findall(document.read_text())
        if not any((root / path).exists() for root in (ROOT, ROOT / "tests"))
    ]
    assert missing == []


def _given(value: str) -> str:
    """A value of compose.yaml with ``${NAME:-default}`` and ``${NAME:?reason}`` replaced."""
    return re.sub(
        r"\$\{\w+(?::?([-?])([^}]*))?\}", lambda found: found[2] if found[1] == "-" else f"{'0' * 64}:t", value
    )


@pytest.mark.parametrize("name", OURS)
def test_compose_calls_each_role_as_it_wants_to_be_called(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Command line and environment of every service of ours are accepted by `inferq`, up to the point where the role
    would begin to work, and the ports that others look for are those it would listen on."""
    monkeypatch.chdir(tmp_path)
    service = COMPOSE[name]
    for variable, value in service["environment"].items():
        monkeypatch.setenv(variable, _given(str(value)))
    command = [_given(part) for part in service["command"]]
    started: list[Any] = []

    async def begin(settings: Any, *_: object) -> None:
        started.append(settings)

    work = "run_worker" if command[0] == "worker" else "serve"
    monkeypatch.setattr(ROLES[command[0]], work, begin)
    monkeypatch.setattr(reporting, "configure_logging", lambda *_: None)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    (settings,) = started
    assert settings.host == "0.0.0.0"  # noqa: S104 - compared, not bound
    assert settings.join_token.get_secret_value()
    assert f":{settings.port}/healthz" in " ".join(service["healthcheck"]["test"])
    for url in _urls(command):
        host, _, port = url.removeprefix("http://").partition(":")
        assert port == _port_of(host), f"{name} looks for {host} on {port}"


def _urls(command: Sequence[str]) -> list[str]:
    return [url for part in command if part.startswith("http://") for url in part.split(",")]


def _port_of(name: str) -> str:
    """Where a service of the compose file listens: as its command says, else vLLM's default."""
    command = COMPOSE[name]["command"]
    return str(command[command.index("--port") + 1]) if "--port" in command else "8000"
