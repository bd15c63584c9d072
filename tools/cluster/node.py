"""The one real node: containerd, kubelet, kube-proxy and cluster DNS as processes of this machine.

Pods have their own network behind point-to-point links, so that every packet between them passes the host and with it kube-proxy's rules
(a bridge would need a kernel module for that). The API server advertises an address of an own, otherwise unused bridge.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path

import yaml

from cluster import binaries, controlplane
from cluster.controlplane import POD_CIDR, Plane, healthy
from cluster.supervise import Component

BRIDGE = "kube0"
HOST_IP = "198.51.100.1"  # RFC 5737: for documentation, so it is nobody's
NODE = "millrace-node"
PAUSE_IMAGE = "registry.k8s.io/pause:3.10"
CNI_FOLDER = "/usr/lib/cni"
KUBELET_PORT = 10250
PROGRAMS = ("containerd", "runc", "iptables", "conntrack", "ip", "kubectl")
DEBIAN = "containerd runc iptables conntrack containernetworking-plugins iproute2 docker.io debootstrap etcd-server"
_TIMEOUT_S = 60.0
_INSTALL_TIMEOUT_S = 900.0


def missing() -> str:
    """What is needed for a node and is not here, or empty."""
    if os.geteuid() != 0:
        return "needs root: a real node makes cgroups, network namespaces and mounts"
    lacking = [name for name in PROGRAMS if not shutil.which(name)]
    lacking += [] if Path(CNI_FOLDER, "ptp").exists() else ["CNI plugins"]
    return f"needs {', '.join(lacking)} (Debian: {DEBIAN})" if lacking else ""


def install() -> None:
    """On Debian, as root, install what is missing; elsewhere nothing is touched."""
    lacking = missing() or controlplane.missing()
    if not lacking or os.geteuid() != 0 or not shutil.which("apt-get"):
        return
    print(f"cluster: installing {DEBIAN}", file=sys.stderr, flush=True)
    # RUNLEVEL=1: the packages must not start their servers; the cluster starts its own.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *DEBIAN.split()]):
        subprocess.run(
            ["apt-get", "-qq", *command],
            check=False,
            env=environment,
            stdout=subprocess.DEVNULL,
            timeout=_INSTALL_TIMEOUT_S,
        )


def call(*command: str, check: bool = True, stdin: str | None = None) -> str:
    """Run a program to its end and return what it printed.

    Raises:
        subprocess.CalledProcessError: it failed, and `check` is set.
    """
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=_TIMEOUT_S, input=stdin, stdin=None
    )
    if check and done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout


def containerd_socket(folder: Path) -> Path:
    """Where this node's containerd listens."""
    return folder / "containerd.sock"


def prepare(plane: Plane) -> None:
    """The bridge, forwarding, and every settings file."""
    call("ip", "link", "add", BRIDGE, "type", "bridge", check=False)
    call("ip", "addr", "replace", f"{HOST_IP}/32", "dev", BRIDGE)
    call("ip", "link", "set", BRIDGE, "up")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1", encoding="ascii")
    folder = plane.folder
    for name in ("kubelet", "cni", "containerd", "volumes", "run"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "resolv.conf").write_text("", encoding="ascii")
    (folder / "containerd.toml").write_text(_containerd(folder), encoding="utf-8")
    network = {
        "cniVersion": "0.4.0",
        "name": "millrace",
        "plugins": [
            {
                "type": "ptp",
                "ipMasq": False,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": POD_CIDR}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                    "dataDir": str(folder / "cni-ips"),
                },
                "dns": {"nameservers": [HOST_IP]},
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }
    (folder / "cni" / "10-millrace.conflist").write_text(json.dumps(network), encoding="utf-8")
    kubelet = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": HOST_IP,
        "port": KUBELET_PORT,
        "healthzBindAddress": "127.0.0.1",
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": False,
        "failSwapOn": False,
        "localStorageCapacityIsolation": False,
        "clusterDNS": [HOST_IP],
        "clusterDomain": "cluster.local",
        "resolvConf": str(folder / "resolv.conf"),
        "containerRuntimeEndpoint": f"unix://{containerd_socket(folder)}",
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"memory.available": "200Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "volumePluginDir": str(folder / "kubelet" / "plugins"),
        "syncFrequency": "10s",
        "nodeStatusUpdateFrequency": "5s",
    }
    (folder / "kubelet.yaml").write_text(yaml.safe_dump(kubelet), encoding="utf-8")
    proxy = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "clusterCIDR": POD_CIDR,
        "clientConnection": {"kubeconfig": str(plane.kubeconfig)},
        "metricsBindAddress": "127.0.0.1:10249",
        "healthzBindAddress": "127.0.0.1:10256",
        "conntrack": {"maxPerCore": 0, "min": 0},
        "iptables": {"minSyncPeriod": "0s", "syncPeriod": "30s"},
    }
    (folder / "proxy.yaml").write_text(yaml.safe_dump(proxy), encoding="utf-8")
    (folder / "Corefile").write_text(
        f".:53 {{\n bind {HOST_IP}\n errors\n health 127.0.0.1:8181\n ready 127.0.0.1:8182\n cache 5\n"
        f" kubernetes cluster.local in-addr.arpa {{\n  kubeconfig {plane.kubeconfig}\n  ttl 5\n }}\n}}\n",
        encoding="ascii",
    )


def _containerd(folder: Path) -> str:
    return f"""version = 2
root = "{folder}/containerd"
state = "{folder}/run/containerd"
oom_score = 0
[grpc]
  address = "{containerd_socket(folder)}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI_FOLDER}"
    conf_dir = "{folder}/cni"
"""


def components(plane: Plane) -> list[Component]:
    """The node's processes, in the order of starting; they come after the control plane."""
    kube, folder = str(binaries.BIN / "kube-all"), plane.folder
    kubelet = [kube, "kubelet", f"--config={folder / 'kubelet.yaml'}", f"--kubeconfig={plane.kubeconfig}"]
    kubelet += [f"--hostname-override={NODE}", f"--node-ip={HOST_IP}", f"--root-dir={folder / 'kubelet'}"]
    kubelet += [f"--cert-dir={folder / 'kubelet' / 'pki'}"]
    return [
        Component(
            "containerd",
            ["containerd", "--config", str(folder / "containerd.toml")],
            lambda: bool(call("ctr", "-a", str(containerd_socket(folder)), "version", check=False)),
        ),
        Component("kubelet", kubelet, lambda: healthy("http://127.0.0.1:10248/healthz")),
        Component(
            "kube-proxy",
            [kube, "kube-proxy", f"--config={folder / 'proxy.yaml'}", f"--hostname-override={NODE}"],
            lambda: healthy("http://127.0.0.1:10256/healthz"),
        ),
        Component(
            "coredns",
            [str(binaries.BIN / "coredns"), "-conf", str(folder / "Corefile")],
            lambda: healthy("http://127.0.0.1:8182/ready"),
        ),
    ]


def import_pause(folder: Path) -> None:
    """Give containerd the image that holds a pod's namespaces: one static program, made into an image here."""
    layer = _tar({"pause": ((binaries.BIN / "pause").read_bytes(), 0o755)})
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": ["/pause"], "User": "65535:65535"},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha256(layer).hexdigest()}"]},
        }
    ).encode()
    name = f"{sha256(config).hexdigest()}.json"
    manifest = json.dumps([{"Config": name, "RepoTags": [PAUSE_IMAGE], "Layers": ["layer.tar"]}]).encode()
    archive = folder / "pause.tar"
    files = {name: (config, 0o644), "layer.tar": (layer, 0o644), "manifest.json": (manifest, 0o644)}
    archive.write_bytes(_tar(files))
    call("ctr", "-a", str(containerd_socket(folder)), "-n", "k8s.io", "images", "import", str(archive))
    archive.unlink()


def _tar(files: dict[str, tuple[bytes, int]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, (content, mode) in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), mode
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def remove(folder: Path) -> None:
    """Take away what ended processes leave behind: containers, mounts, links, rules."""
    for shim in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = shim.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0].endswith(b"containerd-shim-runc-v2") and str(folder).encode() in b" ".join(words):
            _kill_tree(int(shim.parent.name))
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    for mount in sorted((m for m in mounts if m.startswith(f"{folder}/")), reverse=True):
        call("umount", "-l", mount, check=False)
    for name in call("ip", "netns", "list", check=False).split():
        if name.startswith("cni-"):
            call("ip", "netns", "delete", name, check=False)
    call("ip", "link", "delete", BRIDGE, check=False)
    call(str(binaries.BIN / "kube-all"), "kube-proxy", "--cleanup", check=False)


def _kill_tree(pid: int) -> None:
    for child in call("pgrep", "-P", str(pid), check=False).split():
        _kill_tree(int(child))
    call("kill", "-9", str(pid), check=False)
