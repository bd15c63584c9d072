"""The files through which Envoy is told what changes; each is replaced whole, by a rename.

Every file holds one `DiscoveryResponse` as JSON, so that people can read it too. Its version is a digest of its content, which
is how the gateway finds out from Envoy's own statistics which content is in force.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

from millrace_inference_gateway.envoy_clusters import http_endpoints, load_assignment, packed, table_clusters
from millrace_inference_gateway.envoy_mirrors import mirror_configuration
from millrace_inference_gateway.envoy_routes import ROUTES_NAME, route_configuration
from millrace_inference_gateway.routes import Arm, RouteTable
from millrace_inference_gateway.settings import GatewaySettings

VERSION_DIGITS = 16


@dataclass(frozen=True, slots=True)
class EnvoyFiles:
    """Where the files are."""

    folder: Path

    @property
    def bootstrap(self) -> Path:
        """What Envoy starts with."""
        return self.folder / "bootstrap.json"

    @property
    def clusters(self) -> Path:
        """CDS."""
        return self.folder / "clusters.json"

    @property
    def routes(self) -> Path:
        """RDS."""
        return self.folder / "routes.json"

    @property
    def mirrors(self) -> Path:
        """RDS of the copies."""
        return self.folder / "mirrors.json"

    @property
    def limits(self) -> Path:
        """RTDS: limits of requests at once that were found while running."""
        return self.folder / "limits.json"

    def secret(self, name: str) -> Path:
        """SDS of one secret."""
        return self.folder / "secrets" / f"{name}.json"

    def endpoints(self, cluster: str) -> Path:
        """EDS of one cluster."""
        return self.folder / "endpoints" / f"{quote(cluster, safe='')}.json"


def envoy_files(settings: GatewaySettings) -> EnvoyFiles:
    """The files of this gateway."""
    return EnvoyFiles(settings.folder / "envoy")


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` whole; readers see the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def write_resources(path: Path, resources: Iterable[Message]) -> str:
    """Write one discovery response, unless it is there already; returns its version."""
    response = discovery_pb2.DiscoveryResponse(resources=[packed(resource) for resource in resources])
    digest = hashlib.sha256()
    for resource in response.resources:
        digest.update(resource.type_url.encode() + b"\n" + resource.value)
    response.version_info = digest.hexdigest()[:VERSION_DIGITS]
    content = MessageToJson(response, preserving_proto_field_name=True, indent=1).encode()
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, content)
    return str(response.version_info)


def write_endpoints(files: EnvoyFiles, arms: Mapping[str, Arm]) -> dict[str, str]:
    """EDS of these arms; returns versions by cluster."""
    versions = {}
    for name, arm in arms.items():
        if all(endpoint.is_ip for endpoint in arm.endpoints):
            versions[name] = write_resources(files.endpoints(name), [load_assignment(name, arm.endpoints)])
            assignment = load_assignment(arm.http_cluster, http_endpoints(arm))
            versions[arm.http_cluster] = write_resources(files.endpoints(arm.http_cluster), [assignment])
    return versions


def write_clusters(files: EnvoyFiles, table: RouteTable, settings: GatewaySettings) -> str:
    """CDS; returns its version. The endpoints have to be there before."""
    names = (name for arm in table.arms.values() for name in (arm.cluster, arm.http_cluster))
    places = {name: str(files.endpoints(name)) for name in names}
    return write_resources(files.clusters, table_clusters(table, settings.envoy, places))


def write_routes(files: EnvoyFiles, table: RouteTable, settings: GatewaySettings) -> str:
    """RDS, that of copies first; returns the version of the routes proper. A copy that comes too early is lost, and nobody waits for it."""
    write_resources(files.mirrors, [mirror_configuration(table)])
    return write_resources(files.routes, [route_configuration(table, settings)])


def remove_endpoints(files: EnvoyFiles, keep: Iterable[Arm]) -> None:
    """Remove the EDS files of versions that no longer exist."""
    wanted = {files.endpoints(name).name for arm in keep for name in (arm.cluster, arm.http_cluster)}
    for path in files.endpoints("x").parent.glob("*.json"):
        if path.name not in wanted:
            path.unlink(missing_ok=True)


__all__ = [
    "ROUTES_NAME", "EnvoyFiles", "envoy_files", "remove_endpoints", "write_atomically", "write_clusters", "write_endpoints",
    "write_resources", "write_routes",
]  # fmt: skip
