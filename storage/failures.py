"""Map the errors of a file store to ``StoreUnavailable``, ``StoreFull`` and ``ObjectMissing``."""

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
    """The object does not exist; the message is its name."""


@contextmanager
def store_errors(what: str, *, reading: bool = False) -> Iterator[None]:
    """Wrap calls of the store about the object ``what``: raises ``StoreFull``, ``StoreUnavailable``, and with
    ``reading`` ``ObjectMissing``.

    Client libraries of object stores raise errors without a common base class: any error means that the call failed.
    Clients are told its class only, because such errors name hosts and buckets; the log has the rest.
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
    reason = error.strerror if isinstance(error, OSError) else None
    return hide_addresses(reason) if reason else type(error).__name__
