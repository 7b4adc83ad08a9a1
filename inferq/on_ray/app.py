"""The application for a Serve config file: ``import_path: inferq.on_ray.app:build`` (deploy/ray/serve.yaml)."""

from __future__ import annotations

from ray import serve

from inferq.ray_cluster.settings import RaySettings
from queue_schemas import CannotStart
from telemetry import get_logger

from .deploy import make_application, settle_manager
from .plan import RayPlan
from .pools import settle_pool
from .status import write_note

_SECRETS = frozenset({"redis_url", "join_token", "api_keys"})

log = get_logger(__name__)


def build(args: dict[str, object]) -> serve.Application:
    """The Routers as a Serve application, the Manager and the workers made sure of beside them.

    ``args`` are settings of table ``[ray]``; everything else, and every secret, comes from the nodes' environment
    (``INFERQ_*``), as Serve shows a config file to everyone who may look at its dashboard. Called by Serve in the
    cluster.
    """
    unknown = sorted(args.keys() - RaySettings.model_fields.keys())
    if unknown:
        hint = ": secrets belong into the nodes' environment" if _SECRETS & set(unknown) else ""
        raise CannotStart(f"args of the Serve application: there is no setting {', '.join(unknown)} in [ray]{hint}")
    plan = RayPlan.load(RaySettings.load(**args))
    for settle in (settle_manager, settle_pool):
        settle(plan, lambda step: log.info("deploying", step=step))
    write_note(plan, from_file=True)
    return make_application(plan)
