"""One client of a Router with the methods of several command groups."""

from __future__ import annotations

from inferq.chat.client import ChatClient
from inferq.fleet.client import FleetClient


class RouterUser(FleetClient, ChatClient):
    """Chats, and looks at the fleet."""
