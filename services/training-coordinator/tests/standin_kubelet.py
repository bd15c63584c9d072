"""A stand-in for one node's kubelet, for tests without containers: it runs the commands of pods as local processes.

Everything around it is real: API server, scheduler, Job controller. It registers a node, renews its lease, takes pods the scheduler binds
to it, runs `millrace-stage` with the pod's volumes as folders, serves logs over HTTPS as kubelets do (the API server asks it), reports
status, and ends pods that are deleted. It has no images (one called `missing` cannot be pulled), no network of its own (names of pods
become loopback), no limits.
"""

import asyncio
import contextlib
import os
import re
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from millrace_training_coordinator.kubeapi import KubeApi, KubernetesError, KubernetesUnavailableError
from parts.server import free_port

MERGE = "application/merge-patch+json"
POLL_S = 0.1
LEASE_S = 5.0


def now(precise: bool = False) -> str:
    text = datetime.now(UTC).isoformat(timespec="microseconds" if precise else "seconds")
    return text.replace("+00:00", "Z")


class RunningPod:
    """A pod whose command runs, or ran."""

    def __init__(self, pod: dict[str, Any], folder: Path, kubelet: "StandinKubelet") -> None:
        self.name = pod["metadata"]["name"]
        self.spec = pod["spec"]
        self.folder = folder
        self.started_at = now()
        self.lines: list[tuple[str, bytes]] = []
        self.grew = asyncio.Event()
        self.over = False
        self.told_to_end = False
        container = self.spec["containers"][0]
        mounts = {m["mountPath"]: folder / m["name"] for m in container["volumeMounts"]}
        for path in mounts.values():
            path.mkdir(parents=True, exist_ok=True)
        self.termination = folder / "termination-log"
        env = {**os.environ, "MILLRACE_TERMINATION_FILE": str(self.termination)}
        for one in container.get("env", []):
            if "valueFrom" in one:
                key = re.search(r"\['(.*)'\]", one["valueFrom"]["fieldRef"]["fieldPath"]).group(1)
                env[one["name"]] = pod["metadata"]["annotations"][key]
            else:
                env[one["name"]] = self._mapped(one.get("value", "").replace("$$", "$"), mounts, kubelet)
        arguments = [argument.replace("$$", "$") for argument in container["args"]]
        assert container["command"] == ["millrace-stage"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "millrace_training_coordinator.stage", *arguments],
            env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def _mapped(self, value: str, mounts: dict[str, Path], kubelet: "StandinKubelet") -> str:
        if value.endswith(":29400"):
            return f"127.0.0.1:{kubelet.port_of(value)}"
        for mount, path in mounts.items():
            if value == mount or value.startswith(f"{mount}/"):
                return str(path) + value[len(mount) :]
        return value

    def kill(self) -> None:
        """SIGKILL to everything, as when a container's first process dies."""
        everything = [psutil.Process(self.process.pid)] if self.process.poll() is None else []
        for process in [*everything, *(child for one in everything for child in one.children(recursive=True))]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def pump(self, loop: asyncio.AbstractEventLoop) -> None:
        """Collect lines with their times; runs in a thread."""
        for line in self.process.stdout:
            loop.call_soon_threadsafe(self._add, (now(precise=True), line))

    def _add(self, line: tuple[str, bytes]) -> None:
        self.lines.append(line)
        self.grew.set()


class StandinKubelet:
    """One node.

    Args:
        api: the API server, as an administrator.
        namespace: the only one whose pods it looks at.
        folder: volumes of pods.
    """

    def __init__(self, api: KubeApi, namespace: str, folder: Path) -> None:
        self._api = api
        self._namespace = namespace
        self._folder = folder
        self.node = f"standin-{namespace}"
        self.pods: dict[str, RunningPod] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._waits: set[str] = set()
        self._ports: dict[str, int] = {}
        self.hold: set[str] = set()
        """Pods whose end is not reported, as if the node were cut off."""

    def port_of(self, name: str) -> int:
        return self._ports.setdefault(name, free_port())

    @asynccontextmanager
    async def running(self) -> AsyncIterator["StandinKubelet"]:
        app = web.Application()
        app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self._logs)
        runner = web.AppRunner(app)
        await runner.setup()
        port = free_port()
        await web.TCPSite(runner, "127.0.0.1", port, ssl_context=self._certificate()).start()
        await self._register(port)
        tasks = [asyncio.create_task(self._lease()), asyncio.create_task(self._work())]
        try:
            yield self
        finally:
            for pod in self.pods.values():
                pod.kill()
            for task in (*tasks, *self._tasks):
                task.cancel()
            results = await asyncio.gather(*tasks, *self._tasks, return_exceptions=True)
            await runner.cleanup()
            await self._api.call("DELETE", f"/api/v1/nodes/{self.node}")
            errors = [r for r in results if isinstance(r, Exception)]
            assert not errors, errors

    def _certificate(self) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, self.node)])
        built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        built = built.serial_number(1).not_valid_before(datetime.now(UTC) - timedelta(hours=1))
        certificate = built.not_valid_after(datetime.now(UTC) + timedelta(days=1)).sign(key, hashes.SHA256())
        file = self._folder / "kubelet.pem"
        pem = serialization.Encoding.PEM
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        file.write_bytes(private + certificate.public_bytes(pem))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context

    async def _register(self, port: int) -> None:
        capacity = {"cpu": "64", "memory": "256Gi", "pods": "100", "ephemeral-storage": "1Ti"}
        node = {
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": self.node, "labels": {"standin": self.node, "kubernetes.io/hostname": self.node}},
            "spec": {"taints": [{"key": "standin", "value": self.node, "effect": "NoSchedule"}]},
        }  # fmt: skip
        await self._api.call("POST", "/api/v1/nodes", body=node)
        ready = {"type": "Ready", "status": "True", "reason": "StandIn", "lastHeartbeatTime": now()}
        status = {
            "capacity": capacity, "allocatable": capacity, "conditions": [ready],
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
        }  # fmt: skip
        await self._patch(f"/api/v1/nodes/{self.node}/status", {"status": status})

    async def _patch(self, path: str, body: dict[str, Any]) -> None:
        await self._api.call("PATCH", path, body=body, content_type=MERGE)

    async def _lease(self) -> None:
        path = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
        spec = {"holderIdentity": self.node, "leaseDurationSeconds": 40}
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": self.node}}
        await self._api.call("POST", path, body={**lease, "spec": {**spec, "renewTime": now(precise=True)}})
        while True:
            with contextlib.suppress(KubernetesUnavailableError):
                await self._patch(f"{path}/{self.node}", {"spec": {"renewTime": now(precise=True)}})
            await asyncio.sleep(LEASE_S)

    async def _work(self) -> None:
        while True:
            with contextlib.suppress(KubernetesUnavailableError, KubernetesError):
                await self._look()
            await asyncio.sleep(POLL_S)

    async def _look(self) -> None:
        selector = {"fieldSelector": f"spec.nodeName={self.node}"}
        found = await self._api.call("GET", f"/api/v1/namespaces/{self._namespace}/pods", params=selector)
        for pod in found["items"]:
            name = pod["metadata"]["name"]
            if "deletionTimestamp" in pod["metadata"]:
                await self._end(pod)
            elif pod["spec"]["containers"][0]["image"] == "missing":
                if name not in self._waits:
                    self._waits.add(name)
                    state = {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "missing"'}}
                    await self._report(name, "Pending", state)
            elif name not in self.pods and pod["status"]["phase"] == "Pending":
                self.pods[name] = RunningPod(pod, self._folder / name, self)
                task = asyncio.create_task(self._run(self.pods[name]))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _run(self, pod: RunningPod) -> None:
        await self._report(pod.name, "Running", {"running": {"startedAt": pod.started_at}}, pod.started_at)
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(pod.pump, loop)
        code = await asyncio.to_thread(pod.process.wait)
        pod.over = True
        pod.grew.set()
        if pod.name in self.hold:
            return
        message = pod.termination.read_text()[:4096] if pod.termination.exists() else ""
        ended = {
            "exitCode": code if code >= 0 else 128 - code, "reason": "Completed" if code == 0 else "Error",
            "message": message, "startedAt": pod.started_at, "finishedAt": now(),
        }  # fmt: skip
        phase = "Succeeded" if code == 0 else "Failed"
        while True:
            with contextlib.suppress(KubernetesUnavailableError):
                with contextlib.suppress(KubernetesError):
                    await self._report(pod.name, phase, {"terminated": ended}, pod.started_at)
                return
            await asyncio.sleep(POLL_S)

    async def _report(self, pod: str, phase: str, state: dict[str, Any], started_at: str | None = None) -> None:
        container = {
            "name": "stage", "state": state, "image": "stand-in", "imageID": "", "restartCount": 0, "ready": False,
        }  # fmt: skip
        status = {"phase": phase, "containerStatuses": [container], "startTime": started_at}
        await self._patch(f"/api/v1/namespaces/{self._namespace}/pods/{pod}/status", {"status": status})

    async def _end(self, pod: dict[str, Any]) -> None:
        name = pod["metadata"]["name"]
        mine = self.pods.get(name)
        if mine is not None and not mine.over:
            if not mine.told_to_end:
                mine.told_to_end = True
                mine.process.terminate()
                grace_s = pod["metadata"].get("deletionGracePeriodSeconds", 30)
                asyncio.get_running_loop().call_later(grace_s, mine.kill)
            return
        path = f"/api/v1/namespaces/{self._namespace}/pods/{name}"
        phase = pod["status"]["phase"]
        if mine is None and phase == "Pending":
            await self._report(name, "Failed", {"terminated": {"exitCode": 137, "reason": "Error"}})
        elif mine is None or phase in {"Succeeded", "Failed"}:
            with contextlib.suppress(KubernetesError):
                await self._api.call("DELETE", path, params={"gracePeriodSeconds": "0"})

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        pod = self.pods[request.match_info["pod"]]
        since = datetime.fromisoformat(request.query.get("sinceTime", "1970-01-01T00:00:00Z"))
        answer = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await answer.prepare(request)
        sent = 0
        while True:
            pod.grew.clear()
            over = pod.over
            for stamp, line in pod.lines[sent:]:
                sent += 1
                if datetime.fromisoformat(stamp) < since:
                    continue
                with contextlib.suppress(ConnectionError):
                    await answer.write(stamp.encode() + b" " + line)
            if over or request.query.get("follow") != "true":
                return answer
            if sent == len(pod.lines):
                await pod.grew.wait()
