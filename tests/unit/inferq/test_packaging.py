"""What is installed, from where: the locks, and what they must not say."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def _locked(lock: str) -> set[str]:
    return {_name(line) for line in (ROOT / "requirements" / lock).read_text().splitlines() if "==" in line}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_a_lock_names_versions_and_nothing_of_this_machine(lock: Path) -> None:
    """No address, no path, no option: whoever installs brings their own registry."""
    for line in lock.read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[^\s/@]+( ; .+)?", line), line


def test_every_dependency_is_locked() -> None:
    """A dependency that was added without `make lock` would be installed in whatever version there is."""
    extras = PROJECT["optional-dependencies"]
    runtime = {_name(item) for item in [*PROJECT["dependencies"], *extras["otel"]]}
    assert runtime <= _locked("runtime.lock")
    assert {_name(item) for item in extras["dev"]} - {"inferq"} | runtime <= _locked("dev.lock")


def test_tests_run_what_users_run() -> None:
    """Versions of the development set are those of the runtime set."""
    dev, runtime = (
        {line.partition(" ")[0] for line in (ROOT / "requirements" / name).read_text().splitlines()}
        for name in ("dev.lock", "runtime.lock")
    )
    assert runtime <= dev


def test_every_package_is_typed() -> None:
    """``py.typed`` beside each package's code."""
    for package in (
        "batches",
        "broker",
        "inferq",
        "manager",
        "queue_schemas",
        "router",
        "scheduling",
        "simulator",
        "storage",
        "telemetry",
        "worker",
    ):
        assert (ROOT / package / "py.typed").exists(), package


def test_every_package_reaches_the_image_and_the_wheels_check() -> None:
    """One that is missing there is found only where the image or the wheel runs."""
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {pattern.rstrip("*") for pattern in found}
    image = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert packages <= image
    wheel = re.search(r'^packages="(.*)"$', (ROOT / "scripts/wheel_check.sh").read_text(), re.MULTILINE)
    assert wheel is not None and set(wheel[1].split()) == packages
