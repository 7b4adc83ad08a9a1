"""A Ray cluster of our own asks nobody outside."""

from __future__ import annotations

from tests.support.ray_cluster import RayCluster
from tests.support.waiting import eventually


async def test_neither_rays_statistics_nor_a_cloud_nor_a_proxy_is_asked(ray_cluster: RayCluster) -> None:
    """[G12] [G2] Every process of the cluster has the statistics off, and has asked nothing of the proxy that its
    environment names: neither the statistics' server, nor a cloud's metadata, nor the fleet by way of it."""
    # Processes that write their title over their environment show nothing.
    assert ray_cluster.variables("RAY_USAGE_STATS_ENABLED") - {""} == {"0"}
    assert ray_cluster.proxy is not None
    assert ray_cluster.variables("HTTP_PROXY") - {""} == {ray_cluster.proxy.env["HTTP_PROXY"]}
    await eventually(
        lambda: "Usage reporting is disabled" in ray_cluster.dashboard_log(), "the dashboard has decided", limit_s=30
    )
    status = ray_cluster.status()
    assert status["healthy"], status
    assert ray_cluster.proxy.asked == []
