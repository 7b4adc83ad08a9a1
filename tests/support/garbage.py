"""Whether objects are freed when they are done with, without the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """No cycle is collected within, and none is left from before. What there is already is out of sight."""
    gc.collect()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


def alive(*types: type) -> int:
    """How many objects of ``types`` were made since :func:`without_collection` began."""
    return sum(isinstance(one, types) for one in gc.get_objects())
