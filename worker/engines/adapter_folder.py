"""The folder of the LoRA adapters that a worker may load: each sub-folder with an ``adapter_config.json`` is one."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from queue_schemas import BadMessage, CannotStart
from queue_schemas.fleet.adapters import MAX_ADAPTER_NAMES_BYTES, MAX_ADAPTERS
from queue_schemas.ids import check_name
from telemetry import get_logger

CONFIG_FILE = "adapter_config.json"

log = get_logger(__name__)


class AdapterFolder:
    """The adapters below ``folder``, ``room`` of which the engine may have loaded at a time. None is called as one of
    the ``taken`` names.

    Raises ``CannotStart`` for a folder that cannot be read, or with more adapters than a worker may register.
    """

    def __init__(self, folder: Path, room: int, taken: Collection[str] = ()) -> None:
        self.room = room
        self._folder = folder.absolute()
        self._taken = taken
        self.names = self._scan()
        """By which clients call them as models."""

    def path_of(self, name: str) -> str:
        """The folder of an adapter."""
        return str(self._folder / name)

    def scan(self) -> bool:
        """Look again; whether there are other adapters than before. What cannot be registered changes nothing."""
        try:
            names = self._scan()
        except CannotStart as error:
            log.warning("adapters_not_read", error=error.message, then="those of before stay")
            return False
        changed = names != self.names
        self.names = names
        return changed

    def _scan(self) -> frozenset[str]:
        try:
            with os.scandir(self._folder) as entries:
                found = sorted(entry.name for entry in entries if entry.is_dir())
        except OSError as error:
            raise CannotStart(f"--adapters-dir {self._folder} cannot be read: {error.strerror or error}") from error
        names = [name for name in found if self._is_adapter(name)]
        size = sum(len(name.encode()) for name in names)
        if len(names) > MAX_ADAPTERS or size > MAX_ADAPTER_NAMES_BYTES:
            raise CannotStart(
                f"--adapters-dir {self._folder} has {len(names)} adapters with {size} bytes of names: a worker may "
                f"register {MAX_ADAPTERS} with {MAX_ADAPTER_NAMES_BYTES}; spread them over folders of several workers"
            )
        return frozenset(names)

    def _is_adapter(self, name: str) -> bool:
        if not (self._folder / name / CONFIG_FILE).is_file():
            return False
        try:
            check_name(name, "model")
            if name not in self._taken:
                return True
            why = "the engine's model is called so"
        except (BadMessage, UnicodeEncodeError) as error:
            why = str(error)[:200]
        log.warning("adapter_name_refused", adapter=ascii(name)[:100], error=why)
        return False
