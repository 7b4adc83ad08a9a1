"""Check and repair the embedded server's append-only file before Valkey loads it.

The file has several parts: a manifest names a base (an RDB snapshot) and the files of commands written since. Valkey
itself cuts a tail that ends within a command. A tail of other bytes, as disks leave behind after a power cut, makes it
refuse to start: :meth:`QueueLog.repair` cuts the tail and keeps a copy of the file. Damage with readable commands
behind it is cut only on request, because those commands are lost with it. Blocks: run it in a thread.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from queue_schemas import CannotStart

from .log_scan import Damage, scan

_NAME = "appendonly.aof"
_ENTRY = re.compile(r"file (?P<file>\S+) seq (?P<seq>\d+) type (?P<type>[bhi])(?: .*)?")
_FILE = re.compile(rf"{re.escape(_NAME)}\.(?P<seq>\d+)\.(?P<kind>base\.rdb|base\.aof|incr\.aof)")
_CHECK_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was cut, and a copy of the file as it was."""

    path: Path
    bytes_cut: int
    backup: Path


class QueueLog:
    """What lies in ``folder``, the server's working folder. Nothing may be writing to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = folder / "appendonlydir"
        self._manifest = self._files / f"{_NAME}.manifest"

    def restore_manifest(self) -> str:
        """Rewrite the manifest from the files' names if it is missing or cannot be read: without it Valkey would start
        empty, or not at all. Returns what was done, as a sentence; empty: nothing. Raises ``CannotStart``."""
        if not self._files.is_dir() or self._entries() is not None:
            return ""
        found = [match for file in sorted(self._files.iterdir()) if (match := _FILE.fullmatch(file.name))]
        bases = [match for match in found if match["kind"].startswith("base")]
        increments = sorted((match for match in found if match["kind"] == "incr.aof"), key=lambda one: int(one["seq"]))
        if not found and not self._manifest.exists():
            return ""
        if len(bases) > 1 or not found:
            raise CannotStart(
                f"the embedded queue's {self._manifest} is missing or damaged, and its files do not say which of them "
                f"count: {self.restore_advice}"
            )
        backup = self._move_to_damaged(self._manifest) if self._manifest.exists() else None
        lines = [f"file {one.string} seq {one['seq']} type b" for one in bases]
        lines += [f"file {one.string} seq {one['seq']} type i" for one in increments]
        self._write_manifest(lines)
        was = f"was damaged (it is kept as {backup})" if backup is not None else "was missing"
        return f"{self._manifest} {was} and was rewritten from the names of {len(found)} files"

    def find_damage(self) -> Damage | None:
        """The first place that cannot be read; None: all is well, or only the last file breaks off, which Valkey
        repairs. The base is not looked into (:meth:`base_problem`)."""
        files = self._increments()
        for file in files:
            damage = scan(file, last=file == files[-1])
            if damage is not None:
                return damage
        return None

    def base_problem(self, server: Path) -> str:
        """What is wrong with the base, as Valkey's own check (within ``server``) says; empty: nothing."""
        for entry in self._entries() or ():
            file = self._files / entry["file"]
            if entry["type"] == "h":
                continue
            if not file.exists():
                return f"{file} is missing"
            if entry["type"] == "b" and file.suffix == ".rdb":
                try:
                    done = subprocess.run(  # noqa: S603 - our own server, under the name that makes it a checker
                        ["valkey-check-rdb", str(file)],  # noqa: S607
                        executable=server,
                        capture_output=True,
                        timeout=_CHECK_LIMIT_S,
                        check=False,
                    )
                except subprocess.TimeoutExpired:
                    return ""
                if done.returncode:
                    return f"{file} is damaged"
        return ""

    def repair(self, server: Path, *, cut_commands: bool = False) -> Repaired | None:
        """Cut a damaged tail; ``cut_commands``: wherever the damage is, with all that is behind it. None: nothing is
        damaged. Raises ``CannotStart`` with what to do where it cannot be, or must not be, repaired."""
        if problem := self.base_problem(server):
            raise CannotStart(f"the embedded queue's {problem}, and nothing can repair that: {self.restore_advice}")
        damage = self.find_damage()
        if damage is None:
            return None
        if not cut_commands and not self.is_repaired_by_valkey(damage):
            raise CannotStart(f"{self.describe(damage)}: {self.remedy}")
        return self._cut(damage)

    @staticmethod
    def is_repaired_by_valkey(damage: Damage) -> bool:
        """Whether it is cut without being asked: a tail, of a file that can be read up to there."""
        return damage.at > 0 and not damage.commands_follow

    @property
    def manifest_problem(self) -> str:
        """What is wrong with the manifest; empty: nothing, or there are no data."""
        if not self._files.is_dir() or self._entries() is not None or not any(self._files.iterdir()):
            return ""
        return f"{self._manifest} is {'damaged' if self._manifest.exists() else 'missing'}"

    @property
    def size(self) -> int:
        """Bytes of the files of commands."""
        return sum(file.stat().st_size for file in self._increments())

    def describe(self, damage: Damage) -> str:
        """Where the damage is, as the beginning of a sentence."""
        behind = ", and what is behind that can be read again" if damage.commands_follow else ""
        return f"the embedded queue's {damage.path} is damaged at byte {damage.at} of {damage.size}{behind}"

    @property
    def remedy(self) -> str:
        """What may be done about damage that is not repaired by itself."""
        command = f"inferq doctor --repair-queue --data-dir {self.folder.parent.parent}"
        return f"`{command}` cuts the file there and keeps it as it was, too; or {self.restore_advice}"

    @property
    def restore_advice(self) -> str:
        """How to restore the data, or to start without them."""
        return (
            f"put back a copy of {self.folder}, or begin with an empty queue: "
            f"mv {self.folder} {self.folder.with_name('aof-damaged')}"
        )

    def _cut(self, damage: Damage) -> Repaired:
        if shutil.disk_usage(self._files).free < damage.at:
            raise CannotStart(f"the disk has no room to repair {damage.path} and keep it as it was: free some space")
        draft = damage.path.with_name(f"{damage.path.name}.new")
        with damage.path.open("rb") as whole, draft.open("wb") as part:
            left = damage.at
            while left and (piece := whole.read(min(left, 1 << 20))):
                part.write(piece)
                left -= len(piece)
            part.flush()
            os.fsync(part.fileno())
        entries = self._entries() or []
        later = [self._files / one["file"] for one in entries if one["type"] == "i"]
        later = later[later.index(damage.path) + 1 :]
        # A process killed between any two of these steps leaves data that the next start reads or repairs: what comes
        # behind the damage must never be read without what stood at it, and a file of the manifest never be missing.
        if later:
            names = {file.name for file in later}
            self._write_manifest([one.string for one in entries if one["file"] not in names])
        backup = self._damaged_path(damage.path)
        try:
            backup.hardlink_to(damage.path)
        except OSError:  # a file system without links
            shutil.copy2(damage.path, backup)
        draft.replace(damage.path)
        cut = damage.bytes_cut
        for file in later:
            if file.exists():
                cut += file.stat().st_size
                self._move_to_damaged(file)
        return Repaired(damage.path, cut, backup)

    def _move_to_damaged(self, file: Path) -> Path:
        """Move a file to where Valkey does not look. Returns its new path."""
        backup = self._damaged_path(file)
        file.replace(backup)
        return backup

    def _damaged_path(self, file: Path) -> Path:
        """A free path for a file, where Valkey does not look."""
        folder = self.folder / "damaged"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder / f"{time.strftime('%Y%m%dT%H%M%S')}-{time.monotonic_ns()}-{file.name}"

    def _entries(self) -> list[re.Match[str]] | None:
        """The manifest's lines; None if it is missing or not one."""
        try:
            lines = self._manifest.read_text("utf-8").splitlines()
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        entries = [_ENTRY.fullmatch(line) for line in lines if line and not line.startswith("#")]
        if not entries or None in entries:
            return None
        return [entry for entry in entries if entry is not None and "/" not in entry["file"]]

    def _increments(self) -> list[Path]:
        entries = [one for one in self._entries() or () if one["type"] == "i"]
        return [file for one in entries if (file := self._files / one["file"]).exists()]

    def _write_manifest(self, lines: list[str]) -> None:
        draft = self._manifest.with_name(f"temp-{self._manifest.name}")
        with draft.open("w") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._manifest)
