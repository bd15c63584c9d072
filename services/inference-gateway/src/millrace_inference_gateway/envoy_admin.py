"""Questions to Envoy's admin page: what is in force, who is healthy."""

import asyncio
import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from millrace_inference_gateway.settings import split_address

TIMEOUT_S = 2.0
MAX_ANSWER_BYTES = 64 << 20


class EnvoyDownError(Exception):
    """Envoy does not answer."""


@dataclass(frozen=True, slots=True)
class EnvoyStats:
    """Numbers and texts by name."""

    numbers: Mapping[str, int]
    texts: Mapping[str, str]


class EnvoyAdmin:
    """Envoy's admin page at `address`."""

    def __init__(self, address: str) -> None:
        self._host, self._port = split_address(address, "envoy_admin_listen")

    async def stats(self, regex: str) -> EnvoyStats:
        """Statistics whose name matches.

        Raises:
            EnvoyDownError: no answer.
        """
        body = await asyncio.to_thread(self._get, f"/stats?format=json&filter={quote(regex, safe='')}")
        numbers: dict[str, int] = {}
        texts: dict[str, str] = {}
        for entry in body.get("stats", ()):
            value = entry.get("value")
            if isinstance(value, int):
                numbers[entry["name"]] = value
            elif isinstance(value, str):
                texts[entry["name"]] = value
        return EnvoyStats(numbers, texts)

    async def state(self) -> str:
        """LIVE, DRAINING, PRE_INITIALIZING or INITIALIZING.

        Raises:
            EnvoyDownError: no answer.
        """
        return str((await asyncio.to_thread(self._get, "/server_info")).get("state", ""))

    async def healthy_servers(self) -> set[tuple[str, str]]:
        """Cluster and `host:port` of every server that takes traffic.

        Raises:
            EnvoyDownError: no answer.
        """
        body = await asyncio.to_thread(self._get, "/clusters?format=json")
        found = set()
        for cluster in body.get("cluster_statuses", ()):
            for host in cluster.get("host_statuses", ()):
                place = host.get("address", {}).get("socket_address", {})
                if host.get("health_status", {}).get("eds_health_status") and not any(
                    host["health_status"].get(flag)
                    for flag in ("failed_active_health_check", "pending_active_hc", "pending_dynamic_removal")
                ):
                    found.add((str(cluster.get("name")), f"{place.get('address')}:{place.get('port_value')}"))
        return found

    def _get(self, path: str) -> dict[str, Any]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            content = response.read(MAX_ANSWER_BYTES)
            if response.status != http.client.OK:
                raise EnvoyDownError(f"admin page answered {response.status} to {path}")
            found = json.loads(content)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise EnvoyDownError(f"admin page at {self._host}:{self._port}: {error}") from error
        finally:
            connection.close()
        if not isinstance(found, dict):
            raise EnvoyDownError(f"admin page answered no object to {path}")
        return found
