"""`python -m cluster up|down|status`: the throw-away cluster of this machine.

`up` builds what the cache lacks, starts control plane and node under a supervisor in the background and returns when the node is Ready;
the kubeconfig is `build/cluster/kubeconfig`. `down` ends and removes everything. `serve` is the supervisor itself.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from cluster import binaries, controlplane, node
from cluster.controlplane import Plane
from cluster.supervise import run

ROOT = Path(__file__).parent.parent.parent
FOLDER = Path(os.environ.get("MILLRACE_CLUSTER", "/var/lib/millrace-cluster"))
"""Images, containers and volumes; outside the checkout, where a `make clean` would meet mounted file systems."""
KUBECONFIG = ROOT / "build" / "cluster" / "kubeconfig"
READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 90.0
VOLUMES = 64
"""Each is bound once; a release that is removed and installed again takes new ones."""
PRODUCT = Plane(FOLDER, address=node.HOST_IP)


def main() -> int:
    """Run the command."""
    commands = {"up": up, "down": down, "status": status, "serve": serve}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        print(__doc__, file=sys.stderr)
        return 2
    return commands[sys.argv[1]]()


def serve() -> int:
    """Run every process until told to end."""
    controlplane.prepare(PRODUCT)
    node.prepare(PRODUCT)
    return run(FOLDER, [*controlplane.components(PRODUCT), *node.components(PRODUCT)], _settle)


def up() -> int:
    """Start the cluster, or say that it is there."""
    node.install()
    if reason := controlplane.missing() or node.missing():
        print(f"cluster: {reason}", file=sys.stderr)
        return 1
    if _pid():
        return status()
    binaries.build("kube-all", "coredns", "pause")
    node.remove(FOLDER)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    began = time.monotonic()
    with (FOLDER / "supervisor.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster", "serve"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT / "tools")},
        )
    (FOLDER / "supervisor.pid").write_text(str(process.pid), encoding="ascii")
    while not (FOLDER / "ready").exists():
        if process.poll() is not None or time.monotonic() - began > READY_TIMEOUT_S:
            print((FOLDER / "supervisor.log").read_text(encoding="utf-8")[-4000:], file=sys.stderr)
            down()
            return 1
        time.sleep(0.1)
    KUBECONFIG.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(PRODUCT.kubeconfig, KUBECONFIG)
    KUBECONFIG.chmod(0o600)
    print(f"cluster: node Ready after {time.monotonic() - began:.0f} s", file=sys.stderr)
    return status()


def down() -> int:
    """End everything and remove the folder."""
    pid = _pid()
    if pid:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while _pid() and time.monotonic() < deadline:
            time.sleep(0.1)
    node.remove(FOLDER)
    shutil.rmtree(FOLDER, ignore_errors=True)
    KUBECONFIG.unlink(missing_ok=True)
    return 0


def status() -> int:
    """Say where the kubeconfig is, and the nodes."""
    if not _pid():
        print("cluster: not running (make cluster)", file=sys.stderr)
        return 1
    print(node.call("kubectl", "--kubeconfig", str(PRODUCT.kubeconfig), "get", "nodes"), end="", file=sys.stderr)
    print(f"export KUBECONFIG={KUBECONFIG}")
    return 0


def _pid() -> int:
    file = FOLDER / "supervisor.pid"
    with contextlib.suppress(OSError, ValueError):
        pid = int(file.read_text(encoding="ascii"))
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return pid if b"serve" in words else 0
    return 0


def _settle() -> None:
    """What a cluster has before anybody uses it: the pause image, volumes, a Ready node."""
    node.import_pause(FOLDER)
    kubectl = ["kubectl", "--kubeconfig", str(PRODUCT.kubeconfig)]
    node.call(*kubectl, "apply", "-f", "-", stdin=yaml.safe_dump_all(_volumes()))
    node.call(*kubectl, "wait", "--for=condition=Ready", f"node/{node.NODE}", "--timeout=55s")
    (FOLDER / "ready").touch()


def _volumes() -> list[dict[str, object]]:
    """A default StorageClass and volumes on this machine's disk; the folders are open to every user, as fsGroup does not
    reach hostPath volumes.
    """
    objects: list[dict[str, object]] = [
        {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {"name": "local", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
            "provisioner": "kubernetes.io/no-provisioner",
            "volumeBindingMode": "Immediate",
        }
    ]
    for number in range(VOLUMES):
        path = FOLDER / "volumes" / f"{number:02d}"
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o777)
        objects.append(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": f"local-{number:02d}"},
                "spec": {
                    "capacity": {"storage": "20Gi"},
                    "accessModes": ["ReadWriteOnce", "ReadWriteMany"],
                    "persistentVolumeReclaimPolicy": "Retain",
                    "storageClassName": "local",
                    "hostPath": {"path": str(path)},
                },
            }
        )
    return objects


if __name__ == "__main__":
    raise SystemExit(main())
