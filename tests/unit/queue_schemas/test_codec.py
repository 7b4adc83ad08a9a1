"""The bounded codec: what it writes it reads, and hostile bytes cost nothing but a clear error."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from queue_schemas import BadMessage, InferqError, Job, unpack_frames
from queue_schemas.codec import MAX_DEPTH, MAX_ELEMENTS, decode, decode_all, encode

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=40)
    | st.binary(max_size=40)
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(values)
def test_what_is_written_is_read(value: object) -> None:
    """Any value of the contract's types comes back as it was."""
    assert decode(encode(value)) == value


@given(st.lists(values, max_size=4))
def test_values_that_stand_one_behind_the_other_are_all_read(several: list[object]) -> None:
    """A run of packed values is read as the list of them."""
    assert decode_all(b"".join(map(encode, several))) == several


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """Random bytes never raise anything but an error of ours, whoever reads them."""
    for read in (decode, decode_all, Job.unpack, unpack_frames):
        try:
            read(data)
        except InferqError as error:
            assert error.status == 400


@given(values, st.integers(1, 60))
def test_a_message_cut_short_is_refused(value: object, cut: int) -> None:
    """Half a message is never taken for a whole one."""
    data = encode([value, value])
    half = data[: max(len(data) - cut, 1)]
    for read, cut_short in ((decode, half), (decode_all, half), (decode_all, data + half)):
        with pytest.raises(BadMessage):
            read(cut_short)


def test_trailing_bytes_are_refused() -> None:
    """One message is one value."""
    with pytest.raises(BadMessage):
        decode(encode(1) + b"\x01")


@pytest.mark.parametrize(
    "extension",
    [msgpack.Timestamp(1, 2), msgpack.ExtType(0, b""), msgpack.ExtType(5, b"1234"), msgpack.ExtType(127, b"x")],
)
def test_extension_types_are_refused(extension: object) -> None:
    """Timestamps and custom types are no part of the contract."""
    for read in (decode, decode_all):
        with pytest.raises(BadMessage):
            read(msgpack.packb([extension]))


def nested(depth: int) -> bytes:
    """Lists within lists."""
    return b"\x91" * depth + b"\xc0"


def test_nesting_is_bounded() -> None:
    """A few levels are read, more are refused, thousands do not break the reader."""
    assert decode(nested(MAX_DEPTH)) is not None
    for depth in (MAX_DEPTH + 1, 500, 5_000, 100_000):
        with pytest.raises(BadMessage):
            decode(nested(depth))


def test_nested_maps_are_bounded_too() -> None:
    """The same for maps."""
    with pytest.raises(BadMessage):
        decode(b"\x81\xa1k" * (MAX_DEPTH + 1) + b"\xc0")


@pytest.mark.parametrize(
    "header",
    [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"],
    ids=["array", "map", "str", "bin"],
)
def test_a_header_that_promises_gigabytes_is_refused_at_once(header: bytes) -> None:
    """Nothing is allocated for elements that are not there."""
    with pytest.raises(BadMessage):
        decode(header)
    with pytest.raises(BadMessage):
        decode_all(header)


def test_the_number_of_elements_is_bounded() -> None:
    """More elements than any honest message has."""
    assert len(decode(encode([0] * MAX_ELEMENTS))) == MAX_ELEMENTS
    with pytest.raises(BadMessage):
        decode(encode([0] * (MAX_ELEMENTS + 1)))


def test_map_keys_are_text() -> None:
    """Keys that are numbers or lists are refused."""
    for data in (b"\x81\x01\x02", b"\x81\x91\x01\x02"):
        with pytest.raises(BadMessage):
            decode(data)


def test_the_size_of_a_message_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message over the limit is refused before it is looked at."""
    monkeypatch.setattr("queue_schemas.codec.MAX_MESSAGE_BYTES", 10)
    assert decode(encode(b"1234")) == b"1234"
    for read in (decode, decode_all):
        with pytest.raises(BadMessage, match="limit is 10"):
            read(encode(b"0123456789"))


def test_nested_headers_allocate_no_more_than_their_message_has() -> None:
    """A thousand arrays in each other, each said to have 60,000 elements: of five kilobytes."""
    decode_all(encode([1] * 40))  # an unpacker that is used again
    tracemalloc.start()
    try:
        with pytest.raises(BadMessage, match="exceeds max_array_len"):
            decode_all(b"\xdd\x00\x00\xea\x60" * 1_000)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("number", [31, 32, 33, 5_000])
def test_arrays_and_maps_of_any_size_are_read(number: int) -> None:
    """Those that are larger than a frame's as well."""
    values = [list(range(number)), {str(key): key for key in range(number)}]
    assert decode_all(b"".join(map(encode, values))) == values


@pytest.mark.parametrize("bad", [b"\x92\x01", b"\xc1", encode([1]) + b"\xdc", encode(msgpack.packb(1)) + b"\x91"])
def test_a_malformed_message_leaves_nothing_to_the_next(bad: bytes) -> None:
    """Packers and unpackers are used again, but not after an error: the next message is read and written as it is."""
    for _ in range(3):
        with pytest.raises(BadMessage):
            decode_all(bad)
        assert decode_all(encode([1, b"two"]) + encode("three")) == [[1, b"two"], "three"]
        with pytest.raises(TypeError):
            encode([b"half of it", object()])
        assert encode([1, b"two"]) == msgpack.packb([1, b"two"])


def test_many_threads_pack_and_unpack_at_once() -> None:
    """A packer or an unpacker belongs to one thread while it works."""

    def work(number: int) -> bool:
        values = [[number, f"{number}" * 50, {"n": number}]] * 20
        return all(decode_all(b"".join(map(encode, values))) == values for _ in range(50))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(32)))
