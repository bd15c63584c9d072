"""A namespace of a real API server, the controller in it, and a hand that plays the kubelet: it makes pods ready, or not."""

import asyncio
import itertools
import secrets
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from millrace_kit.server import running
from millrace_rollout_controller.app import build
from millrace_rollout_controller.kubernetes import crd, names
from millrace_rollout_controller.kubernetes.api import ApiError, Cluster
from millrace_rollout_controller.kubernetes.settings import KubernetesSettings, LeaseSettings
from millrace_rollout_controller.settings import RolloutSettings

from .peers import Peers
from .support import until

Object = dict[str, Any]
BEAT_S = 5.0
"""How often a node says that it lives. The node controller marks every pod of a silent one as not ready."""
NODES = "/api/v1/nodes"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


async def kubectl(kubeconfig: Path, *arguments: str, stdin: str = "", check: bool = True) -> str:
    command = ["kubectl", f"--kubeconfig={kubeconfig}", *arguments]
    found = await asyncio.to_thread(subprocess.run, command, input=stdin, capture_output=True, text=True, check=False)
    assert not check or found.returncode == 0, found.stderr
    return found.stdout + found.stderr


@dataclass
class World:
    """One namespace, and what is in it."""

    kubeconfig: Path
    cluster: Cluster
    failing: dict[str, Object] = field(default_factory=dict)
    """Pod statuses by version, instead of ready."""
    shown: set[str] = field(default_factory=set)
    hand: Callable[[Object], Awaitable[bool]] | None = None
    """Runs pods that hold several versions and says at every turn whether one is ready; without, every pod is."""

    @property
    def namespace(self) -> str:
        return self.cluster.namespace

    @property
    def node(self) -> str:
        """Where the pods of this world run; no other world's, whose kubelet may have ended."""
        return self.namespace

    def path(self, kind: str, name: str = "") -> str:
        groups = {
            "modeldeployments": f"/apis/{names.API_VERSION}",
            "deployments": "/apis/apps/v1",
            "poddisruptionbudgets": "/apis/policy/v1",
            "horizontalpodautoscalers": "/apis/autoscaling/v2",
            "endpointslices": "/apis/discovery.k8s.io/v1",
            "leases": "/apis/coordination.k8s.io/v1",
        }
        root = f"{groups.get(kind, '/api/v1')}/namespaces/{self.namespace}/{kind}"
        return f"{root}/{name}" if name else root

    async def get(self, kind: str, name: str) -> Object | None:
        try:
            return await self.cluster.get(self.path(kind, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(self, kind: str) -> list[Object]:
        found: list[Object] = (await self.cluster.get(self.path(kind)))["items"]
        return found

    async def apply(
        self, version: str, *, name: str = "flight-delay", model: str = "flight-delay", **spec: Any
    ) -> Object:
        body = {
            "apiVersion": names.API_VERSION,
            "kind": "ModelDeployment",
            "metadata": {"name": name},
            "spec": {"model": model, "version": version} | spec,
        }
        return await self.cluster.apply(self.path("modeldeployments", name), body, manager="person")

    async def status(self, name: str = "flight-delay") -> Object:
        found = await self.get("modeldeployments", name)
        return (found or {}).get("status") or {}

    async def phase(self, phase: str, version: str = "", name: str = "flight-delay", timeout_s: float = 20) -> Object:
        last: Object = {}

        async def there() -> bool:
            nonlocal last
            found = await self.get("modeldeployments", name)
            assert found is not None
            last = found.get("status") or {}
            current = last.get("observedGeneration") == found["metadata"]["generation"]
            return current and last.get("phase") == phase and version in {"", last.get("stableVersion")}

        try:
            await until(there, timeout_s)
        except AssertionError:
            shown = {key: value for key, value in last.items() if key != "internal"}
            raise AssertionError(f"{phase} {version} not reached:\n{yaml.safe_dump(shown)}") from None
        return last

    async def kubelet(self) -> None:
        """Play the kubelet and the endpoints' part of it: every pod runs, and is ready unless its version fails."""
        address = itertools.count(1)
        next_beat = 0.0
        while True:
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + BEAT_S
                await self._beat()
            for pod in await self.list("pods"):
                await self._run(pod, address)
            await asyncio.sleep(0.1)

    async def _beat(self) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": now}
        await self.cluster.merge(f"{NODES}/{self.node}/status", {"status": {"conditions": [ready]}}, fenced=False)

    async def _run(self, pod: Object, address: Any) -> None:
        metadata = pod["metadata"]
        name, version = metadata["name"], metadata["annotations"].get(names.VERSION_ANNOTATION, "")
        if metadata.get("deletionTimestamp"):
            body = {"gracePeriodSeconds": 0}
            await self._quietly(self.cluster._send("DELETE", self.path("pods", name), {}, body, "application/json"))
            return
        wanted = self.failing.get(version)
        ready = wanted is None
        if self.hand is not None and version == names.SHARED:
            ready = await self.hand(pod)
        # Said again at every turn where it fails: the scheduler has a word to say about a pod that is bound nowhere.
        if ready and name in self.shown:
            return
        number = next(address)
        ip = pod.get("status", {}).get("podIP") or f"10.9.{number // 250}.{number % 250 + 1}"
        if (ready or self.hand is not None) and not pod["spec"].get("nodeName"):
            binding = {
                "apiVersion": "v1",
                "kind": "Binding",
                "metadata": {"name": name},
                "target": {"apiVersion": "v1", "kind": "Node", "name": self.node},
            }
            await self._quietly(self.cluster.create(self.path("pods", name) + "/binding", binding, fenced=False))
        status: Object = {
            "phase": "Running" if ready or self.hand is not None else "Pending",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "conditions": [
                {"type": "PodScheduled", "status": "True"},
                {"type": "Ready", "status": "True" if ready else "False"},
            ],
        }
        said = {"status": status | (wanted or {})}
        await self._quietly(self.cluster.merge(self.path("pods", name) + "/status", said, fenced=False))
        (self.shown.add if ready else self.shown.discard)(name)

    async def _quietly(self, call: Awaitable[object]) -> None:
        """Pods come and go meanwhile."""
        try:
            await call
        except ApiError as error:
            if error.status not in {404, 409}:
                raise

    async def annotate(self, action: str, name: str = "flight-delay") -> None:
        body = {"metadata": {"annotations": {names.ACTION_ANNOTATION: action}}}
        await self.cluster.merge(self.path("modeldeployments", name), body)

    async def answered(self, nonce: str) -> Object:
        async def there() -> Object | None:
            last: Object = (await self.status()).get("lastAction") or {}
            return last if last.get("id") == nonce else None

        found = await until(there, what=f"an answer to {nonce}")
        assert isinstance(found, dict)
        return found


def settings(kubeconfig: Path, namespace: str, folder: Path, peers: Peers, pod: str = "one") -> RolloutSettings:
    return RolloutSettings.model_validate(
        {
            "state_dir": str(folder), "registry_address": peers.address, "gateway_addresses": (peers.address,),
            "drift_address": peers.address, "drain_s": 0.2, "tick_s": 0.05, "poll_s": 0.2, "gateway_forget_s": 2.0,
            "kubernetes": KubernetesSettings(
                namespace=namespace, kubeconfig=str(kubeconfig), pod_name=pod, evidence_save_s=0.5, writes_per_s=500,
                lease=LeaseSettings(duration_s=12, renew_deadline_s=8, renew_s=0.2), label_own_pod=False,
            ),
        }
    )  # fmt: skip


@asynccontextmanager
async def world(kubeconfig: Path) -> AsyncIterator[World]:
    """A namespace with the CRD."""
    namespace = f"rollout-{secrets.token_hex(4)}"
    wanted = KubernetesSettings(namespace=namespace, kubeconfig=str(kubeconfig), writes_per_s=1000, write_burst=1000)
    cluster = await Cluster.connect(wanted)
    body = crd.definition()
    await cluster.apply(f"{CRDS}/{body['metadata']['name']}", body)
    await cluster.apply(
        f"/api/v1/namespaces/{namespace}", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
    )
    made = World(kubeconfig, cluster)
    # Closed to the scheduler: the hand alone places pods and says what is the matter with them.
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": made.node}, "spec": {"unschedulable": True}}
    await cluster.apply(f"{NODES}/{made.node}", node)

    async def served() -> bool:
        try:
            await made.list("modeldeployments")
        except ApiError:
            return False
        return True

    await until(served, what="the CRD is served")
    try:
        yield made
    finally:
        await cluster.close()


@asynccontextmanager
async def controller(wanted: RolloutSettings) -> AsyncIterator[str]:
    async with running(await build(wanted), wanted) as address:
        yield address
