"""A role's output: everything in the file, the trouble on the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inferq.stack import logs
from inferq.stack.logs import RoleLog, readable_error
from worker.engines.log_tail import LogTail


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (json.dumps({"level": "info", "event": "ready"}), None),
        (json.dumps({"level": "warning", "event": "late"}), None),
        (json.dumps({"level": {}, "event": "of another program"}), None),
        (json.dumps({"level": "error", "event": "engine_failed", "code": 3, "role": "worker"}), "engine_failed code=3"),
        ("inferq: port 9000 is taken", "inferq: port 9000 is taken"),
        ("Traceback (most recent call last):", None),
        ('  File "x.py", line 3, in y', None),
        ("ValueError: no", "ValueError: no"),
        ("    | broker.errors.BrokerFull: no", None),
        ("    | RuntimeError: no", "RuntimeError: no"),
        ("{broken", "{broken"),
        ("", None),
    ],
)
def test_people_see_what_went_wrong_and_no_more(line: str, told: str | None) -> None:
    """Errors and last words; not the daily news, not the frames of a traceback."""
    assert readable_error(line) == told


def test_the_file_keeps_every_line(tmp_path: Path) -> None:
    """Also those that nobody is told of, after those of earlier runs."""
    path, told = tmp_path / "logs" / "router.log", []
    for _ in range(2):
        with RoleLog(path, told.append) as log:
            log.write(b'{"level": "info", "event": "a"}\n')
            log.write(b"inferq: refused\n")
    assert path.read_text().splitlines() == ['{"level": "info", "event": "a"}', "inferq: refused"] * 2
    assert told == ["inferq: refused"] * 2
    assert log.last_words == "inferq: refused"


def test_the_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full, it becomes the one older file; the one before that is gone."""
    monkeypatch.setattr(logs, "MAX_BYTES", 100)
    path = tmp_path / "router.log"
    with RoleLog(path, lambda _: None) as log:
        for number in range(50):
            log.write(f"line {number:02d}".encode())
    assert path.stat().st_size <= 100
    assert path.with_suffix(".log.1").stat().st_size <= 100
    assert path.read_text().endswith("line 49\n")
    assert len(list(tmp_path.iterdir())) == 2


def test_other_users_cannot_read_what_processes_write(tmp_path: Path) -> None:
    """[H20] Logs have addresses, and what engines print has prompts: neither the folder nor a file, an older part
    included, is open to everybody."""
    path = tmp_path / "logs" / "worker-1.log"
    with RoleLog(path, lambda _: None) as log:
        log.write(b"a line")
    engine = LogTail(tmp_path / "engines" / "worker-1-engine.log")
    engine.write(b"a line\n")
    engine.close()
    for folder in (path.parent, tmp_path / "engines"):
        assert [each.stat().st_mode & 0o007 for each in (folder, *folder.iterdir())] == [0, 0]
