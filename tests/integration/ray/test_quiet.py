"""A Ray cluster of our own reports to nobody."""

from __future__ import annotations

from tests.support.ray_cluster import RayCluster
from tests.support.waiting import eventually


async def test_rays_statistics_are_off_in_every_process(ray_cluster: RayCluster) -> None:
    """[G12] The head and all that it starts have the statistics off, and nowhere to report even that; loopback is no
    proxy's."""
    # Processes that write their title over their environment show nothing.
    assert ray_cluster.variables("RAY_USAGE_STATS_ENABLED") - {""} == {"0"}
    assert ray_cluster.variables("RAY_USAGE_STATS_REPORT_URL") - {""} == {"off:"}
    assert all("127.0.0.1" in value for value in ray_cluster.variables("NO_PROXY") - {""})
    await eventually(
        lambda: "Usage reporting is disabled" in ray_cluster.dashboard_log(), "the dashboard has decided", limit_s=30
    )
