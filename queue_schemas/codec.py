"""Encode and decode msgpack within bounds, for everything that travels through Redis.

Decoding refuses what a well-behaved peer never sends: extension types, too many bytes, too many elements, too much
nesting. It never executes anything. Errors are :class:`~queue_schemas.errors.BadMessage`.
"""

from __future__ import annotations

from typing import Any

import msgpack

from .errors import BadMessage

MAX_MESSAGE_BYTES = 128 * 1024 * 1024
"""Largest message decoded: the largest body a Router may be set to accept, with room for the envelope."""
MAX_ELEMENTS = 65_536
MAX_DEPTH = 16


def encode(value: Any) -> bytes:
    """``value`` (None, bool, int, float, str, bytes, list, tuple, dict of str) as msgpack."""
    try:
        packer = _packers.pop()
    except IndexError:
        packer = msgpack.Packer(use_bin_type=True, buf_size=_BUFFER_BYTES)
    packed: bytes = packer.pack(value)
    if len(packed) <= _BUFFER_BYTES:  # a larger buffer is not kept
        _packers.append(packer)
    return packed


def decode(data: bytes, *, max_containers: int | None = None) -> Any:
    """The one value in ``data``. ``max_containers``: the most lists and maps that it may have, for what strangers send:
    one takes a byte, and 64 once it is decoded."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise BadMessage(f"message of {len(data)} bytes; the limit is {MAX_MESSAGE_BYTES}")
    limits = _limits(len(data))
    if max_containers is not None and len(data) > max_containers:
        limits = limits | _counting(max_containers)
    try:
        value = msgpack.unpackb(data, **limits)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise BadMessage(f"not a valid message: {error}") from error
    _check_depth(value)
    return value


def decode_all(data: bytes) -> list[Any]:
    """The values in ``data``, which stand one behind the other."""
    size = len(data)
    if size > MAX_MESSAGE_BYTES:
        raise BadMessage(f"message of {size} bytes; the limit is {MAX_MESSAGE_BYTES}")
    if _REUSED_ELEMENTS <= size <= MAX_ELEMENTS:
        try:
            unpacker = _unpackers.pop()
        except IndexError:
            unpacker = msgpack.Unpacker(**_LIMITS_OF_REUSED, max_buffer_size=MAX_ELEMENTS)
        try:
            values = _read_all(unpacker, data)
        except BadMessage:
            pass  # or it is larger than a frame: what it may be, its own limits say
        else:
            _unpackers.append(unpacker)  # nothing of this message is left in it
            return values
    return _read_all(msgpack.Unpacker(**_limits(size), max_buffer_size=max(size, 1)), data)


def _read_all(unpacker: Any, data: bytes) -> list[Any]:
    start = end = unpacker.tell()
    unpacker.feed(data)
    values = []
    try:
        for value in unpacker:
            if type(value) is not list or not _NESTING.isdisjoint(map(type, value)):  # a frame is a list without any
                _check_depth(value)
            values.append(value)
            end = unpacker.tell()
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise BadMessage(f"not a valid message: {error}") from error
    if end - start != len(data):
        raise BadMessage("the message is cut short")
    return values


def _limits(size: int) -> dict[str, Any]:
    # What msgpack bounds by itself: no string, array or map may claim to be larger than the message.
    return _LIMITS if size <= MAX_ELEMENTS else _LIMITS_OF_LARGE


def _counting(most: int) -> dict[str, Any]:
    left = most

    def count(container: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"more than {most} lists and maps")
        return container

    return {"list_hook": count, "object_hook": count}


def _refuse_extension(code: int, _data: bytes) -> Any:
    raise ValueError(f"extension type {code} is not part of the contract")


_LIMITS: dict[str, Any] = {"max_ext_len": 0, "ext_hook": _refuse_extension, "timestamp": 0}
_LIMITS_OF_LARGE = _LIMITS | {"max_array_len": MAX_ELEMENTS, "max_map_len": MAX_ELEMENTS}
_REUSED_ELEMENTS = 32
_LIMITS_OF_REUSED = _LIMITS | {"max_array_len": _REUSED_ELEMENTS, "max_map_len": _REUSED_ELEMENTS}
# An unpacker that reads many messages cannot have the limits of each: it reads what has no longer array or map than a
# frame, which is no more than any of its messages may claim.


_NESTING = frozenset({list, dict})
_BUFFER_BYTES = 4096
# To make either costs several times as much as to use it: an unpacker is 43 kB, which are cleared. Each is out of its
# list while it works, so no two threads use it; one that met an error is not put back.
_packers: list[Any] = []
_unpackers: list[Any] = []


def _check_depth(value: Any, depth: int = 0) -> None:
    kind = type(value)  # what msgpack unpacks is a list or a dict itself, never a subclass
    if kind not in _NESTING:
        return
    if depth >= MAX_DEPTH:
        raise BadMessage(f"nested deeper than {MAX_DEPTH} levels")
    items = value.values() if kind is dict else value
    if _NESTING.isdisjoint(map(type, items)):
        return
    for item in items:
        if type(item) in _NESTING:
            _check_depth(item, depth + 1)
