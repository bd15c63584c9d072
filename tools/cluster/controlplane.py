"""The control plane: etcd, API server, controller manager, scheduler, as processes of this machine.

With it alone every API works, controllers make Pods from Deployments and Jobs, and the scheduler binds them to nodes; nothing runs them,
which is what tests of controllers want. `python -m cluster.controlplane FOLDER PORT ETCD_PORT` is the supervised process.
"""

import base64
import json
import os
import shutil
import signal
import ssl
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import yaml
from parts.server import PartError, Server, free_port, start

from cluster import binaries, certificates
from cluster.supervise import Component, run

TOKEN = "millrace-test-admin"  # noqa: S105 - the admin of a throw-away cluster that listens on this machine alone
SERVICE_CIDR = "10.96.0.0/16"
SERVICE_IP = "10.96.0.1"
"""The API server inside the cluster: the first address of the range."""
POD_CIDR = "10.244.0.0/16"
KUBECONFIG = "kubeconfig"


@dataclass(frozen=True)
class Plane:
    """Where a control plane keeps its files and listens."""

    folder: Path
    address: str = "127.0.0.1"
    port: int = 6443
    etcd_port: int = 2379
    etcd_peer_port: int = 2380

    @property
    def kubeconfig(self) -> Path:
        """Admin's kubeconfig."""
        return self.folder / KUBECONFIG

    @property
    def certificates(self) -> Path:
        """Authority, the API server's certificate and the service accounts' key."""
        return self.folder / "certificates"

    @property
    def url(self) -> str:
        """The API server."""
        return f"https://{self.address}:{self.port}"


def missing() -> str:
    """What is needed for a control plane and is not here, or empty."""
    if not shutil.which("etcd"):
        return "needs etcd (Debian: etcd-server)"
    return "" if all(binaries.PROGRAMS[name].built() for name in ("kube-all", "helm")) else binaries.missing()


def prepare(plane: Plane) -> None:
    """Write keys, tokens and the kubeconfig."""
    certificates.issue(plane.certificates, plane.address, SERVICE_IP, "127.0.0.1")
    (plane.folder / "tokens.csv").write_text(f'{TOKEN},admin,admin,"system:masters"\n', encoding="ascii")
    (plane.folder / "tokens.csv").chmod(0o600)
    authority = base64.b64encode((plane.certificates / "ca.crt").read_bytes())
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "millrace",
        "clusters": [
            {
                "name": "millrace",
                "cluster": {"server": plane.url, "certificate-authority-data": authority.decode("ascii")},
            }
        ],
        "users": [{"name": "admin", "user": {"token": TOKEN}}],
        "contexts": [{"name": "millrace", "context": {"cluster": "millrace", "user": "admin"}}],
    }
    plane.kubeconfig.write_text(yaml.safe_dump(config), encoding="utf-8")
    plane.kubeconfig.chmod(0o600)


def healthy(url: str, *, timeout_s: float = 2.0) -> bool:
    """Whether GET of `url` answers 200; the certificate is the component's own and not checked."""
    context = ssl._create_unverified_context()  # noqa: S323, SLF001 - self-signed, on this machine
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})  # noqa: S310 - fixed schemes
    try:
        with urllib.request.urlopen(request, timeout=timeout_s, context=context) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def components(plane: Plane) -> list[Component]:
    """The processes, in the order of starting."""
    kube = str(binaries.BIN / "kube-all")
    etcd_url = f"http://127.0.0.1:{plane.etcd_port}"
    peer_url = f"http://127.0.0.1:{plane.etcd_peer_port}"
    key, authority = str(plane.certificates / "sa.key"), str(plane.certificates / "ca.crt")
    manager_port, scheduler_port = (free_port(), free_port()) if plane.address == "127.0.0.1" else (10257, 10259)
    etcd = ["etcd", "--data-dir", str(plane.folder / "etcd"), "--unsafe-no-fsync", "--name", "node"]
    etcd += ["--listen-client-urls", etcd_url, "--advertise-client-urls", etcd_url]
    etcd += ["--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url]
    etcd += ["--initial-cluster", f"node={peer_url}"]
    api = [kube, "kube-apiserver", f"--etcd-servers={etcd_url}", f"--bind-address={plane.address}"]
    api += [f"--advertise-address={plane.address}", f"--secure-port={plane.port}"]
    api += [f"--tls-cert-file={plane.certificates / 'apiserver.crt'}"]
    api += [
        f"--tls-private-key-file={plane.certificates / 'apiserver.key'}",
        f"--token-auth-file={plane.folder / 'tokens.csv'}",
    ]
    api += ["--authorization-mode=Node,RBAC", "--allow-privileged=true", f"--service-cluster-ip-range={SERVICE_CIDR}"]
    api += [f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}"]
    api += ["--service-account-issuer=https://kubernetes.default.svc", "--kubelet-preferred-address-types=InternalIP"]
    api += ["--profiling=false", "--event-ttl=2h"]
    if plane.address == "127.0.0.1":
        api += ["--endpoint-reconciler-type=none"]  # a loopback address is no endpoint of the Service `kubernetes`
    shared = [f"--kubeconfig={plane.kubeconfig}", f"--authentication-kubeconfig={plane.kubeconfig}"]
    shared += [f"--authorization-kubeconfig={plane.kubeconfig}", "--leader-elect=false", "--bind-address=127.0.0.1"]
    manager = [kube, "kube-controller-manager", *shared, f"--secure-port={manager_port}"]
    manager += [f"--service-account-private-key-file={key}", f"--root-ca-file={authority}"]
    manager += ["--use-service-account-credentials=true", "--allocate-node-cidrs=true", f"--cluster-cidr={POD_CIDR}"]
    manager += [f"--cert-dir={plane.folder / 'manager'}", "--node-monitor-grace-period=40s"]
    scheduler = [kube, "kube-scheduler", *shared, f"--secure-port={scheduler_port}"]
    scheduler += [f"--cert-dir={plane.folder / 'scheduler'}"]
    return [
        Component("etcd", etcd, lambda: healthy(f"{etcd_url}/health"), {"ETCD_UNSUPPORTED_ARCH": ""}),
        Component("kube-apiserver", api, lambda: healthy(f"{plane.url}/readyz")),
        Component("kube-controller-manager", manager, lambda: healthy(f"https://127.0.0.1:{manager_port}/healthz")),
        Component("kube-scheduler", scheduler, lambda: healthy(f"https://127.0.0.1:{scheduler_port}/healthz")),
    ]


def start_control_plane(folder: Path, *, owner_pid: int | None = None) -> Server:
    """A control plane on loopback; the server's address is the path of the admin's kubeconfig."""
    reason = missing()
    if reason:
        raise PartError(f"kubernetes {reason}")
    binaries.build("kube-all")
    folder.mkdir(parents=True, exist_ok=True)
    plane = Plane(folder, port=free_port(), etcd_port=free_port(), etcd_peer_port=free_port())
    (folder / "plane.json").write_text(
        json.dumps([plane.port, plane.etcd_port, plane.etcd_peer_port]), encoding="ascii"
    )
    ready = folder / "ready"
    ready.unlink(missing_ok=True)
    return start(
        "control-plane",
        [sys.executable, "-m", "cluster.controlplane", str(folder)],
        address=str(plane.kubeconfig),
        folder=folder,
        ready=ready.exists,
        owner_pid=owner_pid or os.getpid(),
        stop_signal=signal.SIGTERM,
        environment={"PYTHONPATH": str(Path(__file__).parent.parent)},
    )


def main() -> int:
    """Run the control plane whose folder is the first argument."""
    folder = Path(sys.argv[1])
    port, etcd_port, peer_port = json.loads((folder / "plane.json").read_text(encoding="ascii"))
    plane = Plane(folder, port=port, etcd_port=etcd_port, etcd_peer_port=peer_port)
    prepare(plane)
    return run(folder, components(plane), (folder / "ready").touch)


if __name__ == "__main__":
    raise SystemExit(main())
