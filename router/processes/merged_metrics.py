"""Merges the metrics of several processes that serve as one, so that whoever scrapes one of them sees all.

A snapshot is plain data, for msgpack: ``[name, help, type, [[sample, labels, value], ...]]`` for each family.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from telemetry import MetricsRegistry

Snapshot = list[Any]

_CUMULATIVE = frozenset({"counter", "histogram", "summary"})
_LOWEST = frozenset({"process_start_time_seconds"})
_HIGHEST = frozenset({"python_info", "process_max_fds"})


def take_snapshot(registry: MetricsRegistry) -> Snapshot:
    """What ``registry`` shows now."""
    return [
        [
            family.name,
            family.documentation,
            family.type,
            [[sample.name, dict(sample.labels), sample.value] for sample in family.samples],
        ]
        for family in registry.collectors.collect()
    ]


def what_stays(snapshot: Snapshot) -> Snapshot:
    """The part of ``snapshot`` that still counts once its process has ended: totals, but no gauges."""
    return [family for family in snapshot if family[2] in _CUMULATIVE]


def merge_snapshots(snapshots: Iterable[Snapshot], *, lowest: frozenset[str] = frozenset()) -> Snapshot:
    """One snapshot for all: the sum of each sample. Of times of creation or start, and of the gauges named in
    ``lowest``, it is the lowest; of what describes the interpreter and its limits, the highest."""
    families: dict[str, tuple[str, str, dict[tuple[str, tuple[tuple[str, str], ...]], float]]] = {}
    for snapshot in snapshots:
        for name, text, kind, samples in snapshot:
            _, _, merged = families.setdefault(name, (text, kind, {}))
            for sample, labels, value in samples:
                key = (sample, tuple(sorted(labels.items())))
                if key not in merged:
                    merged[key] = value
                elif sample in _LOWEST or sample in lowest or sample.endswith("_created"):
                    merged[key] = min(merged[key], value)
                elif sample in _HIGHEST:
                    merged[key] = max(merged[key], value)
                else:
                    merged[key] += value
    return [
        [name, text, kind, [[sample, dict(labels), value] for (sample, labels), value in merged.items()]]
        for name, (text, kind, merged) in families.items()
    ]


def sample_value(snapshot: Snapshot, name: str) -> float:
    """The value of the sample ``name`` that has no labels; 0 if there is none."""
    found = (value for *_, samples in snapshot for sample, labels, value in samples if sample == name and not labels)
    return float(sum(found))


def render_snapshot(snapshot: Snapshot) -> tuple[bytes, str]:
    """The answer to ``GET /metrics``: body and content type."""
    return generate_latest(_Families(snapshot)), CONTENT_TYPE_LATEST


class _Families:
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        for name, text, kind, samples in self._snapshot:
            family = Metric(name, text, kind)
            for sample, labels, value in samples:
                family.add_sample(sample, labels, value)
            yield family
