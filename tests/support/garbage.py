"""Whether objects are freed when they are done with, without the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """No cycle is collected within, and none is left from before."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def alive(*types: type) -> int:
    """How many objects of ``types`` there are."""
    return sum(isinstance(one, types) for one in gc.get_objects())
