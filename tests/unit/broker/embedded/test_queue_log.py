"""Damaged data of the embedded queue: repaired by itself, or said in one sentence with what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner

from broker.embedded.queue_log import QueueLog
from broker.embedded.server import EmbeddedServer, find_binary
from inferq.cli import app
from inferq.doctor.findings import Level
from inferq.doctor.queue import _look_at_log
from queue_schemas import CannotStart
from tests.unit.broker.embedded.test_server import client_of

WROTE = 40


@pytest.fixture
async def data(tmp_path: Path) -> Path:
    """A data folder with some keys in it, whose server has ended; `valkey` below it, as `inferq` has it."""
    folder = tmp_path / "valkey"
    async with EmbeddedServer(folder) as server, client_of(server) as client:
        for number in range(WROTE):
            async with client.pipeline(transaction=number % 2 == 0) as pipeline:
                pipeline.set(f"key-{number}", f"*1\r\n$4\r\nPING\r\n{number}" * 10)
                pipeline.rpush("list", number)
                await pipeline.execute()
    return folder


def _file(data: Path) -> Path:
    (file,) = (data / "aof").rglob("*.incr.aof")
    return file


async def _numbers(data: Path) -> list[int]:
    async with EmbeddedServer(data) as server, client_of(server) as client:
        return [int(number) for number in await client.lrange("list", 0, -1)]


@pytest.mark.parametrize("garbage", [b"\0" * 4096, os.urandom(300), b"<html>\r\n"], ids=["zeros", "random", "text"])
async def test_garbage_at_the_end_is_cut_and_the_old_file_kept(data: Path, garbage: bytes) -> None:
    """[G1] The server starts by itself with all that was written; the log says what was cut, and where the old file
    is."""
    file = _file(data)
    before = file.read_bytes() + garbage
    file.write_bytes(before)
    with structlog.testing.capture_logs() as logs:
        assert await _numbers(data) == list(range(WROTE))
    (said,) = [entry for entry in logs if entry["event"] == "queue_log_repaired"]
    assert said["bytes_cut"] == len(garbage)
    (kept,) = (data / "aof" / "damaged").iterdir()
    assert (said["backup"], kept.read_bytes()) == (str(kept), before)


@pytest.mark.parametrize(
    "garbage", [b"*3\r\n$3\r\nSET\r\n$x\r\n", b"*2\r\n$3\r\nDEL\r\n$1\r\nxyz", b"*", b"#TS:1"], ids=range(4)
)
async def test_what_looks_like_a_command_at_the_end_is_cut_as_well(data: Path, garbage: bytes) -> None:
    """[G1] Whether Valkey mends it or we do, nothing else is lost."""
    file = _file(data)
    file.write_bytes(file.read_bytes() + garbage)
    assert await _numbers(data) == list(range(WROTE))


async def test_an_unfinished_transaction_before_the_garbage_goes_with_it(data: Path) -> None:
    """[G1] What Valkey would not have run is not kept either: from its MULTI on."""
    file = _file(data)
    open_end = b"*1\r\n$5\r\nMULTI\r\n*3\r\n$5\r\nRPUSH\r\n$4\r\nlist\r\n$2\r\n99\r\n"
    file.write_bytes(file.read_bytes() + open_end + b"\0\0\0\0")
    assert await _numbers(data) == list(range(WROTE))


async def test_a_file_that_breaks_off_loses_no_more_than_its_last_write(data: Path) -> None:
    """[G1] Valkey mends that by itself."""
    file = _file(data)
    file.write_bytes(file.read_bytes()[:-7])
    assert QueueLog(data / "aof").find_damage() is None
    assert await _numbers(data) == list(range(WROTE - 1))


async def test_damage_in_the_middle_is_cut_only_by_command(data: Path) -> None:
    """[G1] With readable commands behind it, nothing is thrown away unasked: one sentence names the file, the place
    and
    a command, and that command does what it says."""
    file = _file(data)
    before = file.read_bytes()
    place = before.index(b"key-20") - 3
    broken = before[:place] + b"\xff" * 30 + before[place + 30 :]
    file.write_bytes(broken)
    with pytest.raises(CannotStart, match=rf"{file.name} is damaged at byte \d+ of {len(broken)}") as told:
        await EmbeddedServer(data).start()
    assert file.read_bytes() == broken
    command = told.value.message.split("`")[1].split()
    assert command[:3] == ["inferq", "doctor", "--repair-queue"]
    (finding,) = _look_at_log(data, find_binary())
    assert (finding.level, "inferq doctor --repair-queue" in finding.fix) == (Level.FAILURE, True)
    said = CliRunner().invoke(app, command[1:]).output
    assert "cut off" in said
    numbers = await _numbers(data)
    assert numbers == list(range(20)), numbers
    (kept,) = (data / "aof" / "damaged").iterdir()
    assert kept.read_bytes() == broken


async def test_a_damaged_snapshot_is_reported_with_advice(data: Path) -> None:
    """[G1] Nothing can mend a damaged base: the sentence has its path and a way out, and the doctor says it, too."""
    (base,) = (data / "aof").rglob("*.base.rdb")
    base.write_bytes(base.read_bytes()[:10] + b"\xff" * 40)
    with pytest.raises(CannotStart, match=rf"{base.name} is damaged, and nothing can repair that.*mv {data / 'aof'}"):
        await EmbeddedServer(data).start()
    (finding,) = _look_at_log(data, find_binary())
    assert (finding.level, str(base) in finding.text) == (Level.FAILURE, True)


@pytest.mark.parametrize("damage", ["missing", "damaged"])
async def test_a_manifest_is_written_anew_from_the_files(data: Path, damage: str) -> None:
    """[G1] Without it Valkey would begin with an empty queue beside all that is there."""
    (manifest,) = (data / "aof").rglob("*.manifest")
    if damage == "missing":
        manifest.unlink()
    else:
        manifest.write_bytes(b"\0" * 100)
    (finding,) = _look_at_log(data, find_binary())
    assert finding.level is Level.FAILURE
    assert await _numbers(data) == list(range(WROTE))


async def test_the_doctor_says_what_the_next_start_mends_and_when_all_is_well(data: Path) -> None:
    """[G1] A damaged tail is a warning with how much it is; data that can be read are no finding to act on."""
    (finding,) = _look_at_log(data, find_binary())
    assert finding.level is Level.OK
    file = _file(data)
    file.write_bytes(file.read_bytes() + b"\0" * 77)
    (finding,) = _look_at_log(data, find_binary())
    assert finding.level is Level.WARNING
    assert "cuts off 77 bytes" in finding.fix
    async with EmbeddedServer(data):
        assert _look_at_log(data, find_binary()) == []


def test_repairing_what_is_whole_changes_nothing(tmp_path: Path) -> None:
    """[G1] The command is safe to give; without data it says so."""
    result = CliRunner().invoke(app, ["doctor", "--repair-queue", "--data-dir", str(tmp_path)])
    assert result.exit_code != 0
