"""What every unit test gets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Undo what a command sets in the environment: run by a shell it becomes the process, here it would reach the
    tests that follow."""
    with mock.patch.dict(os.environ):
        yield
