"""The Ray cluster that `inferq ray up` started with this data folder."""

from __future__ import annotations

from inferq.ray_cluster.head import read_head
from telemetry.files import absolute_path

from .findings import DoctorTarget, Finding, Level


async def check_ray(examined: DoctorTarget) -> list[Finding]:
    """Check the Ray cluster that `inferq ray up` started."""
    head = read_head(absolute_path(examined.data_dir))
    if head is None:
        return []
    if head.runs:
        return [Finding("ray", Level.OK, f"a Ray cluster of our own runs at {head.address}")]
    fix = "`inferq ray up` starts another; `inferq ray down` ends what this one has left"
    return [Finding("ray", Level.WARNING, f"the Ray cluster at {head.address} ended unexpectedly", fix)]
