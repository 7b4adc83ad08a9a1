"""Traces in files: Mooncake's and Azure's formats, and what is said of a malformed one."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from queue_schemas import BadRequest
from simulator import load_trace
from simulator.requests import TraceRequest

MOONCAKE = """\
{"timestamp": 5000, "input_length": 1100, "output_length": 7, "hash_ids": [3, 1, 9]}

{"timestamp": 5500, "input_length": 512, "output_length": 1, "hash_ids": [3]}
"""
AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 23:59:59.9000000,374,44
2023-11-17 00:00:01.4000001,396,109
"""


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_mooncakes_format(tmp_path: Path, suffix: str) -> None:
    """Times count from the first request in seconds; a block that is not full is left out."""
    trace = load_trace(str(written(tmp_path, suffix, MOONCAKE)))
    assert list(trace.requests()) == [TraceRequest(0.0, 1100, 7, (3, 1)), TraceRequest(0.5, 512, 1, (3,))]
    assert trace.block_tokens == 512


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_azures_format(tmp_path: Path, suffix: str) -> None:
    """Times with seven decimals, over midnight."""
    first, second = load_trace(str(written(tmp_path, suffix, AZURE))).requests()
    assert (first.at_s, first.prompt_tokens, first.output_tokens) == (0.0, 374, 44)
    assert second.at_s == pytest.approx(1.5000001, abs=1e-6)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 3: not JSON"),
        ("[]", "line 3: not a JSON object"),
        ('{"timestamp": 1, "input_length": 5}', "line 3: output_length is None"),
        ('{"timestamp": -1, "input_length": 5, "output_length": 1}', "line 3: timestamp is -1"),
        ('{"timestamp": 6000, "input_length": "5", "output_length": 1}', "line 3: input_length is '5'"),
        ('{"timestamp": 6000, "input_length": 5, "output_length": true}', "line 3: output_length is True"),
        ('{"timestamp": 6000, "input_length": 5, "output_length": 0}', "line 3: a request has at least one"),
        ('{"timestamp": 4999, "input_length": 5, "output_length": 1}', "line 3: its time lies before"),
        ('{"timestamp": 6000, "input_length": 5, "output_length": 1, "hash_ids": [1, 2]}', "2 hash_ids for a prompt"),
        ('{"timestamp": 6000, "input_length": 5, "output_length": 1, "hash_ids": ["a"]}', "not a list of integers"),
    ],
)
def test_a_malformed_line_of_mooncake_is_named(tmp_path: Path, line: str, problem: str) -> None:
    """File, line and field."""
    first = MOONCAKE.splitlines()[0]
    path = written(tmp_path, ".jsonl", f"{first}\n\n{line}\n")
    with pytest.raises(BadRequest, match=f"{re.escape(str(path))}.*{re.escape(problem)}"):
        load_trace(str(path))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("2023-11-17 00:00:02,1", "line 4: 2 columns instead of 3"),
        ("yesterday,1,1", "line 4: 'yesterday' is no time"),
        ("2023-11-17 00:00:02.x,1,1", "is no time"),
        ("2023-11-17 00:00:02,1.5,1", "line 4: '1.5' is not a count of tokens"),
        ("2023-11-17 00:00:02,1,-1", "'-1' is not a count of tokens"),
        ("2023-11-17 00:00:02,1,0", "line 4: a request has at least one"),
        ("2023-11-16 00:00:02,1,1", "line 4: its time lies before"),
    ],
)
def test_a_malformed_line_of_azure_is_named(tmp_path: Path, line: str, problem: str) -> None:
    """File, line and cell."""
    path = written(tmp_path, ".csv", f"{AZURE}{line}\n")
    with pytest.raises(BadRequest, match=re.escape(problem)):
        load_trace(str(path))


def test_what_is_no_trace(tmp_path: Path) -> None:
    """Wrong headings, unknown kinds, damaged archives, empty and missing files."""
    damaged = tmp_path / "damaged.jsonl.gz"
    damaged.write_bytes(gzip.compress(MOONCAKE.encode())[:40])
    for source, problem in (
        (written(tmp_path, ".csv", "time,in,out\n"), "line 1: the heading is not TIMESTAMP"),
        (written(tmp_path, ".txt", ""), "is no trace"),
        (written(tmp_path, ".jsonl", "\n"), "has no requests"),
        (damaged, "cannot be read as a trace"),
        (tmp_path / "missing.jsonl", "cannot be read as a trace"),
        (tmp_path / "missing", "is neither a file nor a generator"),
    ):
        with pytest.raises(BadRequest, match=problem):
            load_trace(str(source))


def written(folder: Path, suffix: str, text: str) -> Path:
    """A file with that text, packed where the suffix says so."""
    path = folder / f"trace{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    return path
