"""Traces: requests with their times, from files and from generators."""

from __future__ import annotations

from pathlib import Path

from queue_schemas import BadRequest

from .azure import azure_trace
from .mooncake import mooncake_trace
from .reading import MalformedLine, Trace
from .synthetic import is_specification, synthetic_trace

__all__ = ["MalformedLine", "Trace", "load_trace"]

_READERS = {".jsonl": mooncake_trace, ".csv": azure_trace}


def load_trace(source: str, *, seed: int = 0) -> Trace:
    """The trace in a file (``.jsonl``: Mooncake's; ``.csv``: Azure's; either may end in ``.gz``), or of a generator
    (``poisson:rate=20,requests=1000``), which ``seed`` determines. Raises ``BadRequest`` with what is wrong with it."""
    if is_specification(source):
        return synthetic_trace(source, seed)
    path = Path(source)
    reader = _READERS.get(path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix)
    if reader is None and not path.exists():
        return synthetic_trace(source, seed)  # which says that there is neither
    if reader is None:
        raise BadRequest(f"{source} is no trace: its name should end in {' or '.join(_READERS)}, perhaps with .gz")
    return reader(path)
