"""Every package names its whole public API in ``__all__``."""

from __future__ import annotations

import importlib
import types

import pytest

PACKAGES = (
    "queue_schemas",
    "scheduling",
    "telemetry",
    "storage",
    "broker",
    "manager",
    "router",
    "worker",
    "batches",
    "simulator",
    "inferq",
)


@pytest.mark.parametrize("name", PACKAGES)
def test_the_public_names_are_listed_and_exist(name: str) -> None:
    """``__all__`` is sorted without regard to case rules of its own, without repeats, and each name is there."""
    package = importlib.import_module(name)
    listed = package.__all__
    assert len(listed) == len(set(listed))
    assert [public for public in listed if not hasattr(package, public)] == []


@pytest.mark.parametrize("name", PACKAGES)
def test_nothing_public_is_left_out(name: str) -> None:
    """What a package imports into its own namespace for users is in ``__all__``."""
    package = importlib.import_module(name)
    public = {
        attribute
        for attribute, value in vars(package).items()
        if not attribute.startswith("_")
        and not isinstance(value, types.ModuleType)
        and getattr(value, "__module__", name).split(".")[0] == name
    }
    assert public <= set(package.__all__) | {"annotations"}


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_say_what_they_are_for(name: str) -> None:
    """A docstring that an outsider can place."""
    assert (importlib.import_module(name).__doc__ or "").strip()
