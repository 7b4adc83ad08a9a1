"""Whatever a store says, as an error of ours."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from queue_schemas import InferqError, StoreFull, StoreUnavailable
from queue_schemas.addresses import hide_addresses
from telemetry import get_logger

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

log = get_logger(__name__)


class ObjectMissing(Exception):
    """There is no such object; the message is its name."""


@contextmanager
def store_errors(what: str, *, reading: bool = False) -> Iterator[None]:
    """Around calls of a store alone, about the object ``what``: raises ``StoreFull``, ``StoreUnavailable``, and
    ``ObjectMissing`` where it is read.

    Stores of objects raise what their client libraries have, of no common kind: all of it means that the store did not
    do it. A client is told no more than the kind, as such errors name hosts and buckets; the log has the rest.
    """
    try:
        yield
    except (InferqError, ObjectMissing):
        raise
    except Exception as error:
        if reading and isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise ObjectMissing(what) from error
        log.warning("store_failed", object=what, error=repr(error))
        if isinstance(error, OSError) and error.errno in _FULL:
            raise StoreFull("the file store has no room left: delete files, or tell the operator") from error
        raise StoreUnavailable(f"the file store cannot be used now ({_reason(error)}); try again") from error


def _reason(error: Exception) -> str:
    said = error.strerror if isinstance(error, OSError) else None
    return hide_addresses(said) if said else type(error).__name__
