"""Duplicate ids, chunks of results, merging them, answers that arrive in several frames."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batches.core import (
    SLICES,
    TABLE,
    Answer,
    EndedJob,
    JobWindow,
    LineBitmap,
    MergedLines,
    OpenLine,
    Result,
    answered,
    custom_id_digest,
    file_of,
    find_duplicates,
    job_of,
    pack_chunk,
    pack_run,
    record,
    reply_stream_of,
    slice_bounds,
    unpack_chunk,
)
from queue_schemas import END, HEAD, Frame, JobId, Marker, MarkerKind
from queue_schemas.ids import check_session_id, shard_of_job
from storage.names import FILE, is_id

BATCH = "batch_" + "0123456789abcdef" * 2


@given(st.lists(st.sampled_from("abcdefghijklmnop"), max_size=40), st.integers(1, 3), st.integers(1, SLICES))
def test_ids_that_stand_twice_are_found_in_any_runs_and_slices(ids: list[str], runs: int, step: int) -> None:
    """Each repeat is told with the line before it, however the file was divided."""
    records = [record(custom_id_digest(name), number) for number, name in enumerate(ids, 1)]
    packed = [pack_run(records[first::runs]) for first in range(runs)]
    found: list[tuple[int, int]] = []
    for first in range(0, SLICES, step):
        parts = []
        for run in packed:
            start, end = slice_bounds(TABLE.unpack(run[: TABLE.size]), first, min(first + step, SLICES))
            parts.append(run[start:end])
        found += find_duplicates(parts, 100)
    expected = set()
    last: dict[str, int] = {}
    for number, name in enumerate(ids, 1):
        if name in last:
            expected.add((number, last[name]))
        last[name] = number
    assert set(found) == expected
    assert len(found) == len(expected)


results = st.builds(Result, st.integers(1, 1_000), st.booleans(), st.binary(max_size=30), st.just((1, 2, 3, 0, 0)))


@given(st.lists(results, max_size=10))
def test_a_chunk_gives_back_what_was_packed(given_results: list[Result]) -> None:
    """Lines of any bytes come out as they went in."""
    assert unpack_chunk(pack_chunk(given_results)) == given_results


def test_half_a_chunk_is_none() -> None:
    """One that was cut short is told, not read as far as it goes."""
    data = pack_chunk([Result(1, True, b"x" * 50)])
    for size in (0, 10, len(data) - 1):
        with pytest.raises(ValueError, match="chunk"):
            unpack_chunk(data[:size])


def test_of_a_line_that_was_stored_twice_the_first_counts() -> None:
    """Counts, usage and text are those of one result a line, also across steps."""
    first = MergedLines(LineBitmap(line_count=20))
    first.add([Result(3, True, b"a\n", (1, 2, 3, 0, 0)), Result(3, False, b"b\n"), Result(20, False, b"c\n")])
    again = MergedLines(LineBitmap(first.merged.pack()))
    again.add([Result(3, True, b"d\n"), Result(4, True, b"e\n", (1, 1, 2, 0, 0)), Result(10_000, True, b"f\n")])
    assert (first.output, first.errors, first.completed, first.failed) == ([b"a\n"], [b"c\n"], 1, 1)
    assert first.usage == [1, 2, 3, 0, 0]
    assert (again.output, again.errors) == ([b"e\n"], [])


def test_names_have_the_shapes_that_others_check() -> None:
    """Job ids, durable replies and file ids pass where any other would."""
    assert shard_of_job(job_of(BATCH, 3, 1, 0)) == 3
    check_session_id(reply_stream_of(BATCH))
    assert is_id(file_of(BATCH, "output"), FILE)
    assert file_of(BATCH, "output") != file_of(BATCH, "error")


def frame(job_id: JobId, seq: int, flags: int, data: bytes, epoch: int = 1, attempt: str = "a") -> Frame:
    return Frame(job_id, epoch, attempt, seq, flags, data, 200, "text/event-stream")


def test_an_answer_in_pieces_is_put_together_and_not_let_go_of() -> None:
    """Nothing of it is dropped before its end; pieces of a lost attempt, repeats and gaps do not get into it."""
    window = JobWindow(BATCH, 0, {7: OpenLine(0, 10, "x")})
    job_id = job_of(BATCH, 0, 7, 0)
    assert window.receive([frame(job_id, 0, HEAD, b"lost")], "5-0") == []
    assert window.receive([frame(job_id, 0, HEAD, b"a", epoch=2)], "6-0") == []
    assert window.safe_to_trim("9-0") == "6-0"
    assert window.receive([frame(job_id, 1, 0, b"x"), frame(job_id, 1, 0, b"b", epoch=2)], "7-0") == []
    assert window.receive([frame(job_id, 1, 0, b"b", epoch=2)], "8-0") == []
    assert window.receive([frame(job_id, 2, END, b"c", epoch=2)], "9-0") == [
        Answer(7, 0, 200, "text/event-stream", b"abc")
    ]
    window.remove(7, 0)
    assert window.safe_to_trim("10-0") == "10-0"


def test_every_generation_of_a_line_may_answer_and_outsiders_may_not() -> None:
    """A late answer of an earlier job is as good; a marker tells how a job ended."""
    window = JobWindow(BATCH, 0, {7: OpenLine(0, 10, "x", 2)})
    for generation in range(3):
        whole = frame(job_of(BATCH, 0, 7, generation), 0, HEAD | END, b"ok")
        assert [(found.line, found.generation) for found in window.receive([whole], "0")] == [(7, generation)]
    dead = Marker(MarkerKind.DEAD, job_of(BATCH, 0, 7, 1), 4, "why")
    assert window.receive([dead], "0") == [EndedJob(7, 1, MarkerKind.DEAD, "why")]
    assert window.receive([Marker(MarkerKind.REQUEUED, dead.job_id, 5, "again")], "0") == []
    assert window.receive([frame(job_of(BATCH, 0, 8, 0), 0, HEAD | END, b"early")], "0") == []
    early = window.early(8)
    assert early is not None
    assert early.body == b"early"
    assert window.early(8) is None


def test_both_apis_words_for_usage_are_understood() -> None:
    """Chat completions and responses count the same tokens under other names."""
    chat = b'{"usage":{"prompt_tokens":3,"completion_tokens":4,"prompt_tokens_details":{"cached_tokens":1}}}'
    details = b'"output_tokens_details":{"reasoning_tokens":2}'
    response = b'{"usage":{"input_tokens":3,"output_tokens":4,"total_tokens":9,' + details + b"}}"
    odd = b'{"usage":{"prompt_tokens":"3","completion_tokens":-1,"total_tokens":true}}'
    found = [answered(1, "r", "c", 200, "application/json", body).usage for body in (chat, response, odd, b"[]")]
    assert found == [(3, 4, 7, 1, 0), (3, 4, 9, 0, 2), (0, 0, 0, 0, 0), (0, 0, 0, 0, 0)]


@pytest.mark.parametrize("body", ['{"text": "a\u2028b\u2029c\x85d"}', "a\u2028b\u2029c\x85d"], ids=["JSON", "text"])
def test_a_line_of_a_file_is_one_line_to_every_reader(body: str) -> None:
    """The SDK's ``iter_lines`` cuts where ``str.splitlines`` does, also at signs that JSON lets stand."""
    text = answered(1, "r", "id\u2028", 200, "application/json", body.encode()).text.decode()
    assert text.splitlines() == [text.removesuffix("\n")]
    shown = json.loads(text)["response"]["body"]
    assert (shown["text"] if isinstance(shown, dict) else shown) == "a\u2028b\u2029c\x85d"
