"""Whole fleets of real processes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.fleet import Fleet
from tests.support.servers import Server, server_binary


@pytest.fixture(scope="module")
def module_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Valkey for the fleet of a whole module."""
    with Server(server_binary(), tmp_path_factory.mktemp("queue")) as server:
        yield server


@pytest.fixture
async def fleet(tmp_path: Path, own_valkey: Server) -> AsyncIterator[Fleet]:
    """A fleet of this test alone, nothing started yet but its Valkey."""
    async with Fleet(tmp_path, own_valkey) as fleet:
        yield fleet
