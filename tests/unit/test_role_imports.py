"""What a role's process loads: each fresh interpreter holds only what its role uses."""

from __future__ import annotations

import subprocess
import sys

import pytest

_EVERYWHERE = (
    "inferq", "ray", "rich", "pygments", "boto3", "botocore", "s3fs", "jinja2", "aiohttp.web",
    "opentelemetry.exporter", "opentelemetry.sdk.trace", "worker.engines.simulated",
)  # fmt: skip
"""Of commands, of other topologies, of optional features, and what libraries load only because it is installed."""
_RQ = ("rq", "broker.rq")
_STORE = ("storage", "fsspec", "webhooks")
_UNUSED = {
    "router": ("manager", "worker", "batches", *_RQ),
    "manager": ("router", "worker", "batches", *_RQ, *_STORE, "broker.embedded"),
    "worker": ("router", "manager", "batches", *_RQ, *_STORE),
    "batches": ("router", "manager", "worker"),
    "webhooks": ("router", "manager", "worker", "batches"),
}


@pytest.mark.parametrize("role", sorted(_UNUSED))
def test_a_role_loads_nothing_that_it_does_not_use(role: str) -> None:
    """A library or package that another role, a command or an optional feature needs costs this process no memory."""
    show = f"import sys, {role}.service; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True).stdout.split()
    )
    assert loaded & {*_EVERYWHERE, *_UNUSED[role]} == set()
