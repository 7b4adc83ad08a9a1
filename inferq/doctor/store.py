"""The file store: is it there, and does it keep what is written to it?"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from inferq.stack.plan import store_url
from queue_schemas import InferqError
from storage import ObjectStore, StorageSettings
from telemetry.redaction import redact_url

from .findings import DoctorTarget, Finding, Level
from .host import nearest_folder

_MEND = "check INFERQ_STORAGE_URL, that the folder or bucket is there, and the rights and keys to write to it"


async def check_store(examined: DoctorTarget) -> list[Finding]:
    """Writes, reads and removes an object where the store is there; a folder that nobody has made yet is not made."""
    url = store_url(examined.data_dir)
    return [await asyncio.to_thread(_look, url)]


def _look(url: str) -> Finding:
    shown = redact_url(url)
    if "://" not in url and not Path(url).exists():
        folder = nearest_folder(Path(url))
        if not os.access(folder, os.W_OK):
            return Finding("store", Level.FAILURE, f"{folder} is not writable, so {shown} cannot be made", _MEND)
        return Finding("store", Level.OK, f"files will lie in {shown}, which is made when it is needed")
    try:
        ObjectStore.open(StorageSettings.load(url=url)).check()
    except InferqError as error:
        why = f": {error.__cause__}" if error.__cause__ is not None else ""
        return Finding("store", Level.FAILURE, f"{shown}: {error.message}{why}", _MEND)
    return Finding("store", Level.OK, f"{shown} takes, gives back and removes an object")
