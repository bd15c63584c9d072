"""A real API server (and its etcd) of a test's own, to be stopped and started, and what a test says to it."""

import contextlib
import json
import os
import signal
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import binaries, controlplane
from cluster.supervise import Supervisor
from parts.server import free_port

SLICES = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"


class ApiServer:
    def __init__(self, folder: Path) -> None:
        self.plane = controlplane.Plane(folder, port=free_port(), etcd_port=free_port(), etcd_peer_port=free_port())
        controlplane.prepare(self.plane)
        self.folder = folder
        self.token_file = folder / "token"
        self.token_file.write_text(controlplane.TOKEN)
        self.ca_file = self.plane.certificates / "ca.crt"
        self._supervisor = Supervisor(folder, controlplane.components(self.plane)[:2])
        self._context = ssl.create_default_context(cafile=str(self.ca_file))
        self._supervisor.start()

    @property
    def settings(self) -> dict[str, object]:
        """The gateway's settings block for it."""
        return {
            "namespace": "default",
            "api_server": self.plane.url,
            "token_file": str(self.token_file),
            "ca_file": str(self.ca_file),
            "backoff_max_s": 0.5,
        }

    def ask(self, method: str, path: str, body: object = None) -> dict:
        request = urllib.request.Request(
            self.plane.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Authorization": f"Bearer {controlplane.TOKEN}",
                "Content-Type": "application/merge-patch+json" if method == "PATCH" else "application/json",
            },
        )
        with urllib.request.urlopen(request, timeout=30, context=self._context) as answer:
            return json.load(answer)

    def put(
        self, name: str, address: str, *, service: str, zone: str | None = None, pod: str = "", **conditions: bool
    ) -> None:
        """One pod in a slice of its own."""
        host, _, port = address.rpartition(":")
        body = {
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4",
            "endpoints": [
                {
                    "addresses": [host],
                    "conditions": conditions or {"ready": True},
                    **({"zone": zone} if zone else {}),
                    **({"targetRef": {"kind": "Pod", "name": pod}} if pod else {}),
                }
            ],
            "ports": [{"name": "grpc", "port": int(port)}],
        }
        try:
            self.ask("POST", SLICES, body)
        except urllib.error.HTTPError as error:
            if error.code != 409:
                raise AssertionError(error.read()) from error
            self.ask("PATCH", f"{SLICES}/{name}", body)

    def remove(self, name: str) -> None:
        self.ask("DELETE", f"{SLICES}/{name}")

    def clear(self) -> None:
        for item in self.ask("GET", SLICES)["items"]:
            self.remove(item["metadata"]["name"])

    def kill(self) -> None:
        os.kill(int((self.folder / "kube-apiserver.pid").read_text()), signal.SIGKILL)
        while controlplane.healthy(f"{self.plane.url}/readyz"):
            time.sleep(0.05)

    def start(self) -> None:
        deadline = time.monotonic() + 60
        while not controlplane.healthy(f"{self.plane.url}/readyz"):
            assert time.monotonic() < deadline
            self._supervisor.look()
            time.sleep(0.1)

    def stop(self) -> None:
        self._supervisor.stop()


@pytest.fixture(scope="module")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    if reason := controlplane.missing():
        pytest.skip(f"kubernetes {reason}")
    binaries.build("kube-all")
    server = ApiServer(tmp_path_factory.mktemp("api"))
    try:
        yield server
    finally:
        server.stop()


def own_address() -> str:
    """An address of this machine that is not loopback, which no EndpointSlice may name."""
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect(("203.0.113.1", 9))
        except OSError:
            pytest.skip("needs an IPv4 address besides loopback")
        return str(probe.getsockname()[0])
