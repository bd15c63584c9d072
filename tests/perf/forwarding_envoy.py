"""An Envoy that only forwards HTTP/2 to one server: what any gateway on Envoy costs at least. No routes by name, no log, no health checks."""

import asyncio
import contextlib
import json
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from millrace_inference_gateway.envoy_process import envoy_binary
from parts.server import free_port

HCM = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
ROUTER = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
HTTP = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
READY_S = 30.0


def bootstrap(port: int, server: str) -> dict[str, object]:
    """Envoy's bootstrap: one listener, one cluster, one route."""
    host, _, server_port = server.rpartition(":")
    manager = {
        "@type": HCM,
        "stat_prefix": "forward",
        "codec_type": "HTTP2",
        "http_filters": [{"name": "router", "typed_config": {"@type": ROUTER}}],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "server"}}],
                }
            ]
        },
    }
    endpoint = {"address": {"socket_address": {"address": host, "port_value": int(server_port)}}}
    cluster = {
        "name": "server",
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": HTTP,
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
        "load_assignment": {
            "cluster_name": "server",
            "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}],
        },
    }
    listener = {
        "name": "all",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


@contextlib.asynccontextmanager
async def envoy(config: dict[str, object], port: int) -> AsyncIterator[int]:
    """The process id of an Envoy with this bootstrap and one worker, once it listens."""
    with tempfile.TemporaryDirectory(prefix="perf-envoy-") as folder:
        path = Path(folder) / "bootstrap.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        process = await asyncio.create_subprocess_exec(
            str(envoy_binary()), "--config-path", str(path), "--concurrency", "1", "--disable-hot-restart",
            "--log-level", "error", start_new_session=True,
        )  # fmt: skip
        try:
            async with asyncio.timeout(READY_S):
                while not _listens(port):  # noqa: ASYNC110 - a process gives no event
                    await asyncio.sleep(0.05)
            yield process.pid
        finally:
            process.kill()
            await process.wait()


@contextlib.asynccontextmanager
async def forwarding(server: str) -> AsyncIterator[tuple[str, int]]:
    """Address and process id of an Envoy that forwards to `server`."""
    port = free_port()
    async with envoy(bootstrap(port, server), port) as pid:
        yield f"127.0.0.1:{port}", pid


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
