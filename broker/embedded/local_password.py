"""Add the embedded queue's password to its URL, for roles of the same user that can read its data folder.

A Manager without a join token gives out the queue's URL without its password, because any local program may ask for it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

from queue_schemas.addresses import is_loopback
from telemetry.redaction import has_credentials

DEFAULT_DATA_DIR = ".inferq"


async def complete_url(url: str) -> str:
    """``url`` with the embedded server's password, if it leads to the one that runs on this process's data folder
    (``INFERQ_DATA_DIR``); every other URL as it is."""
    try:
        place = urlsplit(url)
        if sys.platform == "win32" or has_credentials(url) or not place.port or not is_loopback(place.hostname or ""):
            return url
        port = place.port
    except ValueError:  # several hosts: not the embedded server
        return url
    from .server import running_url  # noqa: PLC0415 - needs a POSIX system

    try:
        known = await running_url(Path(os.environ.get("INFERQ_DATA_DIR") or DEFAULT_DATA_DIR) / "valkey")
    except OSError:  # somebody else's folder
        return url
    return known if known and urlsplit(known).port == port else url
