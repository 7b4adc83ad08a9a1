"""What runs in a cluster, as seen by a driver of it."""

from __future__ import annotations

import json
import logging
import time
import urllib.error
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import ray
from ray import serve
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from manager.control_plane import ANOTHER_ACTS
from manager.ray_actor import find_manager
from queue_schemas import CannotStart
from router.ray_serve import DEPLOYMENT
from telemetry.http.fleet_session import direct_opener

from .plan import RayPlan, way_in_url
from .pools import Workers, read_workers

APPLICATION = "inferq"
FACTS_LIMIT_S, PAGE_LIMIT_S = 10.0, 3.0
_NOTE = b"inferq:application"
_POLL_S = 0.1

# Serve tells of each of its steps, and of the other program's options; people read our own words.
logging.getLogger("ray.serve").setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class ManagerStatus:
    """The Manager's actor. ``why_not`` says why it does not answer or cannot act, ``blocked_by_other_manager`` that it
    would if
    another Manager did not: as it should be while a fleet moves."""

    pid: int = 0
    acting: bool = False
    digest: str = ""
    blocked_by_other_manager: bool = False
    why_not: tuple[str, ...] = ()

    @property
    def well(self) -> bool:
        return bool(self.pid) and not self.why_not


@dataclass(frozen=True, slots=True)
class AppStatus:
    """The Serve application, with how many replicas are in each state."""

    state: str
    message: str
    replicas: Mapping[str, int]

    @property
    def runs(self) -> bool:
        return self.state == "RUNNING"


@dataclass(frozen=True, slots=True)
class DeploymentRecord:
    """What the cluster remembers of the application that was put into it last."""

    digest: str
    host: str
    port: int
    way_in: str
    from_file: bool = False
    """Whether Serve has it from a config file, which it goes back to whenever its controller is started again."""

    @property
    def url(self) -> str:
        return way_in_url(self.host, self.port)


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """All of it. ``not_ready`` is what the Router's /readyz says."""

    address: str
    manager: ManagerStatus | None
    application: AppStatus | None
    way_in: str = ""
    url: str = ""
    not_ready: tuple[str, ...] = field(default=("nothing is deployed",))
    workers: Workers = field(default_factory=Workers)

    @property
    def healthy(self) -> bool:
        return (
            self.manager is not None
            and self.manager.well
            and self.application is not None
            and self.application.runs
            and not self.not_ready
            and not self.workers.why_not
        )


def read_status(address: str) -> ClusterStatus:
    """Look at everything."""
    manager, application, note, workers = read_manager(), read_application(), read_note(), read_workers()
    if application is None or note is None:
        return ClusterStatus(address, manager, application, workers=workers)
    return ClusterStatus(address, manager, application, note.way_in, note.url, ask_ready(note.url), workers)


def read_manager() -> ManagerStatus | None:
    """The Manager; None if the cluster has none."""
    actor = find_manager()
    if actor is None:
        return None
    try:
        facts = ray.get(actor.facts.remote(), timeout=FACTS_LIMIT_S)
    except ray.exceptions.RayError as error:
        return ManagerStatus(why_not=(f"its actor does not answer: {str(error).splitlines()[0]}",))
    expected = f"standing by: {ANOTHER_ACTS}"
    reasons = tuple(reason for reason in facts.not_ready if reason != expected)
    return ManagerStatus(facts.pid, facts.acting, facts.digest, expected in facts.not_ready, reasons)


def read_application() -> AppStatus | None:
    """The application; None if Serve has none."""
    found = serve.status().applications.get(APPLICATION)
    if found is None:
        return None
    deployment = found.deployments.get(DEPLOYMENT)
    message = "\n".join(filter(None, (found.message, deployment.message if deployment else "")))
    # States are text, whatever their annotation says.
    replicas = {str(state): count for state, count in deployment.replica_states.items()} if deployment else {}
    return AppStatus(str(found.status.value), message, replicas)


def ask_ready(url: str) -> tuple[str, ...]:
    """Why the Router at ``url`` is not ready; empty if it is."""
    try:
        with direct_opener().open(f"{url}/readyz", timeout=PAGE_LIMIT_S):
            return ()
    except urllib.error.HTTPError as refusal:
        with refusal:
            return _reasons(url, refusal)
    except (OSError, ValueError) as error:
        return (f"nothing answers at {url} ({error})",)


def wait_ready(url: str, limit_s: float) -> tuple[str, ...]:
    """The same, once it is ready or ``limit_s`` is over."""
    limit = time.monotonic() + limit_s
    while (reasons := ask_ready(url)) and time.monotonic() < limit:
        time.sleep(_POLL_S)
    return reasons


def read_note() -> DeploymentRecord | None:
    """What :func:`write_note` wrote."""
    raw = _internal_kv_get(_NOTE)
    if raw is None:
        return None
    try:
        return DeploymentRecord(**json.loads(raw))
    except (ValueError, TypeError) as error:
        raise CannotStart("another version of inferq runs in this cluster: take it down with that one") from error


def write_note(plan: RayPlan, *, from_file: bool = False) -> None:
    """Remember in the cluster what was deployed."""
    note = DeploymentRecord(plan.app_digest, plan.ray.host, plan.ray.port, plan.ray.way_in, from_file)
    _internal_kv_put(_NOTE, json.dumps(asdict(note)).encode(), overwrite=True)


def forget_note() -> None:
    """Nothing is deployed any more."""
    _internal_kv_del(_NOTE)


def _reasons(url: str, refusal: urllib.error.HTTPError) -> tuple[str, ...]:
    try:
        return tuple(map(str, json.loads(refusal.read())["reasons"]))
    except (OSError, ValueError, TypeError, KeyError):
        return (f"what answers at {url} is no Router: it says {refusal.code} to /readyz",)
