"""Tells Envoy what changes and waits until Envoy itself says that it has it."""

import asyncio
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet

from millrace_inference_gateway.envoy_admin import EnvoyAdmin, EnvoyDownError
from millrace_inference_gateway.envoy_files import (
    EnvoyFiles,
    remove_endpoints,
    write_clusters,
    write_endpoints,
    write_routes,
)
from millrace_inference_gateway.routes import Arm, RouteTable
from millrace_inference_gateway.settings import GatewaySettings

POLL_S = 0.02
_VERSIONS = r"(version_text|warming_clusters)$"

Servers = AbstractSet[tuple[str, str]]


def servers(name: str, arm: Arm) -> set[tuple[str, str]]:
    """Cluster and `host:port` of the arm's servers that have an IP address, as Envoy's admin page writes them."""
    return {(name, f"{endpoint.host}:{endpoint.port}") for endpoint in arm.endpoints if endpoint.is_ip}


class EnvoyControl:
    """Envoy behind its files and its admin page.

    Every method raises `EnvoyDownError` when Envoy does not answer; the files are written all the same, for the Envoy that comes.
    """

    def __init__(self, files: EnvoyFiles, admin: EnvoyAdmin, settings: GatewaySettings) -> None:
        self._files = files
        self._admin = admin
        self._settings = settings

    async def clusters(self, table: RouteTable) -> None:
        """Have these clusters and their servers, and no others."""
        await self._until_known(await asyncio.to_thread(self._write_clusters, table))

    async def routes(self, table: RouteTable) -> None:
        """Have these routes."""
        version = await asyncio.to_thread(write_routes, self._files, table, self._settings)
        await self._until_known({"rds.routes.version_text": version})

    async def endpoints(self, arms: Mapping[str, Arm]) -> None:
        """Have these servers in these clusters; other clusters stay as they are."""
        versions = await asyncio.to_thread(write_endpoints, self._files, arms)
        await self._until_known({f"cluster.{name}.version_text": version for name, version in versions.items()})

    async def healthy(self) -> Servers:
        """Servers that take traffic now; none when Envoy is down."""
        try:
            return await self._admin.healthy_servers()
        except EnvoyDownError:
            return set()

    async def forget_others(self, table: RouteTable) -> None:
        """Drop the clusters that `table` does not name, without waiting for it."""
        await asyncio.to_thread(self._write_clusters, table)
        await asyncio.to_thread(remove_endpoints, self._files, list(table.arms.values()))

    def _write_clusters(self, table: RouteTable) -> dict[str, str]:
        written = write_endpoints(self._files, table.arms)
        versions = {f"cluster.{name}.version_text": version for name, version in written.items()}
        versions["cluster_manager.cds.version_text"] = write_clusters(self._files, table, self._settings)
        return versions

    async def _until_known(self, versions: dict[str, str]) -> None:
        while True:
            stats = await self._admin.stats(_VERSIONS)
            known = all(_has(stats.texts.items(), *each) for each in versions.items())
            if known and stats.numbers.get("cluster_manager.warming_clusters", 0) == 0:
                return
            await asyncio.sleep(POLL_S)


def _has(texts: Iterable[tuple[str, str]], suffix: str, version: str) -> bool:
    return any(name.endswith(suffix) and text == version for name, text in texts)
