"""One Helm release on the throw-away cluster, as tests use it: kubectl, helm, the kubectl plugin, clients."""

import base64
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from cluster import binaries
from cluster.node import HOST_IP
from millrace import Client, Endpoints
from millrace_kit.settings import TlsSettings

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "millrace"
RELEASE = "millrace"
CALL_TIMEOUT_S = 120.0
PORTS = {
    "ingestion": ("ingestion", 7401),
    "feature": ("feature", 7402),
    "registry": ("registry", 7403),
    "training": ("training-coordinator", 7404),
    "gateway_admin": ("inference-gateway", 7405),
    "drift": ("drift-monitor", 7406),
    "rollout": ("rollout-controller", 7407),
    "gateway": ("gateway", 7400),
}
T = TypeVar("T")


def eventually(
    what: str, ask: Callable[[], T | None], timeout_s: float = 120.0, why: Callable[[], object] | None = None
) -> T:
    """Ask until there is an answer; fails the test after `timeout_s`, showing what `why` gives."""
    deadline = time.monotonic() + timeout_s
    while (answer := ask()) is None:
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout_s:.0f} s\n{why() if why else ''}")
        time.sleep(0.2)
    return answer


@dataclass
class Release:
    """The release `millrace` in the namespace `millrace`."""

    kubeconfig: Path
    folder: Path
    """Scratch space: client certificates, manifests."""
    namespace: str = NAMESPACE
    environment: dict[str, str] = field(default_factory=dict)
    token: str = field(default_factory=lambda: secrets.token_hex(2))
    """Part of the names of what tests make, so that a run meets nothing of an earlier one."""

    def __post_init__(self) -> None:
        self.environment = {
            **os.environ,
            "KUBECONFIG": str(self.kubeconfig),
            "PATH": f"{ROOT / '.venv' / 'bin'}:{binaries.BIN}:{os.environ['PATH']}",
        }

    def fresh(self, name: str) -> str:
        """A name that no earlier run used."""
        return f"{name}-{self.token}"

    def call(
        self, *command: str, stdin: str | None = None, timeout_s: float = CALL_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a program against the cluster; the caller looks at the exit code."""
        return subprocess.run(
            command, check=False, capture_output=True, text=True, input=stdin, env=self.environment, timeout=timeout_s
        )

    def kubectl(self, *words: str, stdin: str | None = None, timeout_s: float = CALL_TIMEOUT_S) -> str:
        """kubectl in the release's namespace; fails the test when it fails."""
        done = self.call("kubectl", "-n", self.namespace, *words, stdin=stdin, timeout_s=timeout_s)
        assert done.returncode == 0, f"kubectl {' '.join(words)}: {done.stderr}{done.stdout}"
        return done.stdout

    def get(self, *words: str) -> Any:
        """`kubectl get … -o json`."""
        return json.loads(self.kubectl("get", *words, "-o", "json"))

    def helm(self, *words: str, timeout_s: float = 900.0) -> str:
        """helm in the release's namespace; fails the test when it fails, showing the pods."""
        done = self.call("helm", "-n", self.namespace, *words, timeout_s=timeout_s)
        if done.returncode:
            pods = self.call("kubectl", "-n", self.namespace, "get", "pods", "-o", "wide").stdout
            events = self.call(
                "kubectl", "-n", self.namespace, "get", "events", "--sort-by=.lastTimestamp"
            ).stdout.splitlines()[-25:]
            raise AssertionError(f"helm {' '.join(words)}: {done.stderr}\n{pods}\n" + "\n".join(events))
        return done.stdout

    def plugin(self, *words: str, timeout_s: float = CALL_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        """`kubectl millrace …`, found by kubectl on the PATH as any plugin."""
        return self.call("kubectl", "millrace", *words, "-n", self.namespace, timeout_s=timeout_s)

    def address(self, area: str) -> str:
        """A service by its cluster DNS name, resolved by the cluster's own DNS server."""
        service, port = PORTS[area]
        return f"dns://{HOST_IP}:53/{RELEASE}-{service}.{self.namespace}.svc.cluster.local:{port}"

    def endpoints(self) -> Endpoints:
        """Every service."""
        return Endpoints(**{area: self.address(area) for area in PORTS})

    def secret(self, name: str) -> dict[str, bytes]:
        """A Secret's values."""
        return {key: base64.b64decode(value) for key, value in self.get("secret", name)["data"].items()}

    def certificates(self) -> TlsSettings:
        """The certificates the chart makes for people and programs outside (`<release>-client-tls`), as files."""
        paths: dict[str, str] = {}
        for key, value in self.secret(f"{RELEASE}-client-tls").items():
            path = self.folder / key
            path.write_bytes(value)
            path.chmod(0o600)
            paths[key] = str(path)
        return TlsSettings(cert_file=paths["tls.crt"], key_file=paths["tls.key"], ca_file=paths["ca.crt"])

    def client(self) -> Client:
        """The SDK's client over mutual TLS, through the cluster's Services."""
        return Client(self.endpoints(), self.certificates())

    def apply(self, manifest: Mapping[str, Any]) -> str:
        """`kubectl apply` of one object."""
        return self.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(dict(manifest)))

    def deployment(self, name: str) -> dict[str, Any]:
        """A ModelDeployment as it is now."""
        found: dict[str, Any] = self.get("modeldeployment", name)
        return found

    def pods(self, selector: str) -> list[dict[str, Any]]:
        """Pods by labels."""
        found: list[dict[str, Any]] = self.get("pods", "-l", selector)["items"]
        return found

    def unready(self) -> list[str]:
        """Names of the release's pods that run and are not Ready, or wait to run."""
        pods = self.pods(f"app.kubernetes.io/instance={RELEASE}")
        return [
            pod["metadata"]["name"]
            for pod in pods
            if pod["status"]["phase"] not in {"Succeeded", "Failed"}
            and not any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))
        ]

    def wait_stable(self, name: str, version: str, timeout_s: float = 240.0) -> dict[str, Any]:
        """Wait until `version` has all the traffic and nothing moves."""

        def stable() -> dict[str, Any] | None:
            found = self.deployment(name)
            status = found.get("status", {})
            resting = status.get("stableVersion") == version and not status.get("candidateVersion")
            return found if resting and status.get("phase") == "Promoted" else None

        return eventually(f"{name} rests at {version}", stable, timeout_s, lambda: self.describe(name))

    def describe(self, name: str) -> str:
        """What a person would look at when a rollout hangs."""
        parts = [
            self.call("kubectl", "-n", self.namespace, "describe", "modeldeployment", name).stdout[-6000:],
            self.call("kubectl", "-n", self.namespace, "get", "pods", "-o", "wide").stdout,
        ]
        return "\n".join(parts)


def python(*words: str, environment: Mapping[str, str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a Python program of the repository."""
    command: Sequence[str] = [sys.executable, *words]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, env=dict(environment), timeout=timeout_s, cwd=ROOT
    )
