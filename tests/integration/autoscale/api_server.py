"""A small API server of Kubernetes: one Deployment or StatefulSet, its scale and its pods, over real HTTP(S).

It does what its controllers would: pods follow the replicas, those that cost least to delete first, or the highest
ordinals; a pod that is deleted terminates until the test says that it is gone.
"""

from __future__ import annotations

import ssl
from typing import Any

from aiohttp import web

NAMESPACE, NAME, TOKEN = "serving", "workers", "t0ken"
_COST = "controller.kubernetes.io/pod-deletion-cost"


class ApiServer:
    """``async with ApiServer("deployment") as server``. ``refusals`` are statuses of the next calls; ``calls`` are
    those that came."""

    def __init__(self, kind: str, tls: ssl.SSLContext | None = None) -> None:
        self.kind = kind
        self.replicas = 0
        self.version = 1
        self.pods: dict[str, dict[str, Any]] = {}
        self.calls: list[tuple[str, str]] = []
        self.refusals: list[int] = []
        self.garbage = b""
        self.creates_pods = True
        self.deletes_pods = True
        self.tokens = {TOKEN}
        self._tls = tls
        self._made = 0
        self._app = web.Application()
        scale = f"/apis/apps/v1/namespaces/{NAMESPACE}/{kind}s/{NAME}/scale"
        self._app.add_routes(
            [
                web.get(scale, self._get_scale),
                web.patch(scale, self._patch_scale),
                web.get(f"/api/v1/namespaces/{NAMESPACE}/pods", self._list_pods),
                web.patch(f"/api/v1/namespaces/{NAMESPACE}/pods/{{name}}", self._patch_pod),
            ]
        )
        self._app.middlewares.append(self._check)

    async def __aenter__(self) -> ApiServer:
        self._runner = web.AppRunner(self._app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls)
        await site.start()
        port = self._runner.addresses[0][1]
        self.url = f"{'https' if self._tls else 'http'}://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    def gone(self) -> None:
        """What terminates has ended."""
        self.pods = {name: pod for name, pod in self.pods.items() if "deletionTimestamp" not in pod["metadata"]}

    @web.middleware
    async def _check(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.calls.append((request.method, request.path))
        if request.headers.get("authorization", "").removeprefix("Bearer ") not in self.tokens:
            return _status(401, "Unauthorized")
        if self.refusals:
            return _status(self.refusals.pop(0), "as the test wants")
        if self.garbage:
            return web.Response(body=self.garbage, content_type="application/json")
        answer: web.StreamResponse = await handler(request)
        return answer

    def _scale(self) -> web.Response:
        return web.json_response(
            {
                "kind": "Scale",
                "metadata": {"name": NAME, "namespace": NAMESPACE, "resourceVersion": str(self.version)},
                "spec": {"replicas": self.replicas} if self.replicas else {},
                "status": {"replicas": len(self.pods), "selector": "app=workers"},
            }
        )

    async def _get_scale(self, _: web.Request) -> web.Response:
        return self._scale()

    async def _patch_scale(self, request: web.Request) -> web.Response:
        assert request.content_type == "application/merge-patch+json"
        patch = await request.json()
        if patch.get("metadata", {}).get("resourceVersion", str(self.version)) != str(self.version):
            return _status(409, "the object has been modified")
        self.replicas = patch["spec"]["replicas"]
        self.version += 1
        self._follow()
        return self._scale()

    def _follow(self) -> None:
        living = [name for name, pod in self.pods.items() if "deletionTimestamp" not in pod["metadata"]]
        while self.creates_pods and len(living) < self.replicas:
            ordinal = self._made if self.kind == "deployment" else len(living)
            self._made += 1
            name = f"{NAME}-{ordinal}"
            self.pods[name] = {"metadata": {"name": name, "annotations": {}}, "status": {"phase": "Pending"}}
            living.append(name)
        if self.kind == "deployment":
            living.sort(key=lambda name: int(self.pods[name]["metadata"]["annotations"].get(_COST, 0)))
        else:
            living.reverse()
        for name in living[: max(0, len(living) - self.replicas) if self.deletes_pods else 0]:
            self.pods[name]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"

    async def _list_pods(self, request: web.Request) -> web.Response:
        assert request.query["labelSelector"] == "app=workers"
        return web.json_response({"kind": "PodList", "items": list(self.pods.values())})

    async def _patch_pod(self, request: web.Request) -> web.Response:
        pod = self.pods.get(request.match_info["name"])
        if pod is None:
            return _status(404, "pods not found")
        patched = pod["metadata"]["annotations"] | (await request.json())["metadata"]["annotations"]
        pod["metadata"]["annotations"] = {name: value for name, value in patched.items() if value is not None}
        return web.json_response(pod)


def _status(status: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "status": "Failure", "message": message, "code": status}, status=status)
