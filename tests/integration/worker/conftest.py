"""Workers of their own, with a client of the queue."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.servers import Server

from .fleet import Client, LocalFleet, local_fleet_on


@pytest.fixture
async def fleet_and_client(valkey: Server, tmp_path: Path) -> AsyncIterator[tuple[LocalFleet, Client]]:
    """A Manager on an empty queue, and a client of that queue."""
    async with local_fleet_on(valkey, tmp_path) as both:
        yield both


@pytest.fixture
def fleet(fleet_and_client: tuple[LocalFleet, Client]) -> LocalFleet:
    """The Manager, and the workers that a test adds."""
    return fleet_and_client[0]


@pytest.fixture
def client(fleet_and_client: tuple[LocalFleet, Client]) -> Client:
    """A client of the queue."""
    return fleet_and_client[1]
