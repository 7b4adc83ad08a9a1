"""Workers as pods of a Deployment or StatefulSet: its scale is patched through the API server.

A pod is removed by the platform, whose SIGTERM drains the worker in it: it finishes what it runs or hands it over, as
long as the pod's ``terminationGracePeriodSeconds`` gives it time. Of a Deployment, the pods to go are marked with
``pod-deletion-cost``, which Kubernetes honours as far as it can; of a StatefulSet, those with the highest ordinals go.
(https://kubernetes.io/docs/concepts/workloads/controllers/replicaset/#pod-deletion-cost)
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
import orjson

from queue_schemas import CannotStart
from queue_schemas.addresses import is_loopback
from telemetry.http.fleet_session import fleet_session

from ..settings import AutoscaleSettings
from .port import DriverFailed

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
_GOES_FIRST = "-1000"
_MAX_ANSWER_BYTES = 32 << 20
_MERGE_PATCH = "application/merge-patch+json"
_ORDINAL = re.compile(r"-([0-9]+)$")
_ADVICE = {
    401: "the service account's token is refused",
    403: "the service account may not do so: give it the Role of docs/autoscaling.md",
    404: "correct --kubernetes-target and --kubernetes-namespace",
    409: "somebody else scaled it at the same time; it is tried again",
}


class KubernetesDriver:
    """Scales ``kubernetes_target``. A worker's id is its pod's name, which is the host's name in the pod."""

    drains = True
    outdated: frozenset[str] = frozenset()

    def __init__(self, settings: AutoscaleSettings) -> None:
        """Raises ``CannotStart`` if there is no API server, token or namespace to be found."""
        self._account = Path(settings.kubernetes_account_dir)
        kind, _, self._name = settings.kubernetes_target.partition("/")
        self._ordered = kind == "statefulset"
        self._url = _api_url(settings.kubernetes_api_url)
        namespace = settings.kubernetes_namespace or self._read("namespace")
        self._scale = f"/apis/apps/v1/namespaces/{quote(namespace)}/{kind}s/{quote(self._name)}/scale"
        self._pods = f"/api/v1/namespaces/{quote(namespace)}/pods"
        self._timeout_s = settings.driver_timeout / 1000
        self._tls = self._trust() if self._url.startswith("https://") else None
        self._read("token")
        self._session: aiohttp.ClientSession | None = None

    async def workers(self) -> frozenset[str]:
        return frozenset(await self._living(await self._call("GET", self._scale)))

    async def scale_to(self, count: int) -> None:
        scale = await self._call("GET", self._scale)
        if count > _replicas(scale):
            await self._set_replicas(count, scale)

    async def remove(self, worker_ids: Sequence[str]) -> None:
        scale = await self._call("GET", self._scale)
        living = await self._living(scale)
        leaving = [worker_id for worker_id in worker_ids if worker_id in living]
        if not leaving:
            return
        if not self._ordered:
            await self._mark(leaving, living, is_settled=_replicas(scale) >= len(living))
        count = len(living) - len(leaving)
        if count < _replicas(scale):  # otherwise pods that are to go are merely not gone yet
            await self._set_replicas(count, scale)

    def removable(self, ordered: Sequence[str], count: int) -> Sequence[str]:
        if not self._ordered:
            return ordered[:count]
        return sorted(ordered, key=_ordinal, reverse=True)[:count]

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _mark(self, leaving: Sequence[str], living: Mapping[str, bool], *, is_settled: bool) -> None:
        """Have these pods go before others. Once it ``is_settled`` who goes, older marks are those of pods that
        stayed, because somebody else scaled meanwhile: they run jobs since, and would go first."""
        stale = [pod for pod, marked in living.items() if is_settled and marked and pod not in leaving]
        for cost, pods in ((None, stale), (_GOES_FIRST, leaving)):
            for pod in pods:
                patch = {"metadata": {"annotations": {DELETION_COST: cost}}}
                await self._call("PATCH", f"{self._pods}/{quote(pod)}", patch)

    async def _living(self, scale: Mapping[str, Any]) -> dict[str, bool]:
        """The names of the pods that are neither being deleted nor over, and whether they are marked to go first."""
        selector = scale.get("status", {}).get("selector", "")
        if not isinstance(selector, str) or not selector:
            raise DriverFailed(f"{self._name} selects no pods: is it a Deployment or StatefulSet?")
        found = await self._call("GET", f"{self._pods}?{urlencode({'labelSelector': selector})}")
        try:
            return {
                str(pod["metadata"]["name"]): (pod["metadata"].get("annotations") or {}).get(DELETION_COST)
                == _GOES_FIRST
                for pod in found["items"]
                if not pod["metadata"].get("deletionTimestamp")
                and pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise DriverFailed("the API server's list of pods cannot be read") from error

    async def _set_replicas(self, count: int, scale: Mapping[str, Any]) -> None:
        """Only if nobody has scaled it since ``scale`` was read."""
        version = scale.get("metadata", {}).get("resourceVersion")
        metadata = {"metadata": {"resourceVersion": version}} if version else {}
        await self._call("PATCH", self._scale, {"spec": {"replicas": count}, **metadata})

    async def _call(self, method: str, path: str, patch: Mapping[str, object] | None = None) -> dict[str, Any]:
        """The object that the API server answers. Raises ``DriverFailed``."""
        if self._session is None:
            self._session = fleet_session(self._timeout_s)
        # Read each time: kubelets replace tokens before they expire.
        headers = {"authorization": f"Bearer {self._read('token')}", "accept": "application/json"}
        body = None if patch is None else orjson.dumps(patch)
        if body is not None:
            headers["content-type"] = _MERGE_PATCH
        asking = self._session.request(
            method, self._url + path, data=body, headers=headers, allow_redirects=False, ssl=self._tls or True
        )
        try:
            async with asking as answer:
                content = b""
                while piece := await answer.content.read(_MAX_ANSWER_BYTES + 1 - len(content)):
                    content += piece
                status = answer.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise DriverFailed(
                f"the API server at {self._url} does not answer: {error or type(error).__name__}"
            ) from error
        return _object(method, path, status, content)

    def _read(self, name: str) -> str:
        path = self._account / name
        try:
            text = path.read_text().strip()
        except OSError as error:
            raise CannotStart(
                f"{path} cannot be read ({error.strerror}): run in a pod with a service account"
            ) from error
        if not text:
            raise CannotStart(f"{path} is empty: run in a pod with a service account")
        return text

    def _trust(self) -> ssl.SSLContext:
        path = self._account / "ca.crt"
        try:
            return ssl.create_default_context(cafile=str(path))
        except OSError as error:
            raise CannotStart(f"{path} cannot be read as certificates: {error}") from error


def _api_url(given: str) -> str:
    """The API server's URL. Raises ``CannotStart`` for none, and for one to which the token would go unencrypted."""
    url = given.rstrip("/")
    if not url:
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise CannotStart("this is no pod of a cluster: give --kubernetes-api-url")
        url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    scheme, _, rest = url.partition("://")
    if scheme == "https" or (scheme == "http" and is_loopback(rest.rpartition(":")[0] or rest)):
        return url
    raise CannotStart(f"--kubernetes-api-url {url}: begin with https://, the service account's token is sent there")


def _object(method: str, path: str, status: int, content: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(content)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise DriverFailed(f"the API server answers {status} to {method} {path}, without an object")
    if status >= 300:
        why = str(found.get("message") or found.get("reason") or "no reason given")[:300]
        raise DriverFailed(
            f"the API server answers {status} to {method} {path}: {why} ({_ADVICE.get(status, 'later')})"
        )
    return found


def _replicas(scale: Mapping[str, Any]) -> int:
    replicas = scale.get("spec", {}).get("replicas", 0)  # left out where it is 0
    if type(replicas) is not int or replicas < 0:
        raise DriverFailed(f"the API server says that {replicas!r} replicas are asked for")
    return replicas


def _ordinal(pod: str) -> int:
    found = _ORDINAL.search(pod)
    return int(found[1]) if found else -1
