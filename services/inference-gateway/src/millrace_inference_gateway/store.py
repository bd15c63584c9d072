"""The last known good routes and servers, on disk: a gateway that starts alone serves what it served before."""

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.message import DecodeError
from millrace_api.rollout.v1 import rollout_pb2
from millrace_kit.errors import InvalidArgumentError

from millrace_inference_gateway.envoy_files import write_atomically
from millrace_inference_gateway.routes import Endpoint, RouteTable, Service, check_routes

log = logging.getLogger(__name__)

DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class KeptRoutes:
    """Routes as they came and as they are used."""

    message: rollout_pb2.Routes = field(default_factory=rollout_pb2.Routes)
    table: RouteTable = field(default_factory=RouteTable)


class RouteStore:
    """One file: the SHA-256 of the routes, then the routes, each arm with the servers it last had."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "routes.pb"
        self._written = b""

    def load(self) -> KeptRoutes:
        """The routes kept last; an empty table when there are none or the file is damaged."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return KeptRoutes()
        digest, body = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.sha256(body).digest() == digest:
            try:
                message = rollout_pb2.Routes.FromString(body)
                return KeptRoutes(message, check_routes(message))
            except (DecodeError, InvalidArgumentError) as error:
                log.warning("%s cannot be used: %s", self._path, error)
        log.error("%s is damaged; starting without routes", self._path)
        return KeptRoutes()

    def save(self, kept: KeptRoutes, now: RouteTable) -> None:
        """Keep these routes instead of those before; `now` has the servers each arm has.

        An arm that has none at the moment keeps those of its route: they do no harm, health checks find out.
        """
        message = rollout_pb2.Routes()
        message.CopyFrom(kept.message)
        arms = now.arms
        for route in message.models:
            for arm in route.arms:
                found = arms.get(f"arm/{route.model}/{arm.version}")
                if arm.service and found is not None and found.endpoints:
                    arm.endpoints[:] = [_text(endpoint) for endpoint in found.endpoints]
        body = message.SerializeToString(deterministic=True)
        if body != self._written:
            write_atomically(self._path, hashlib.sha256(body).digest() + body)
            self._written = body


def remembered(table: RouteTable) -> dict[Service, tuple[Endpoint, ...]]:
    """The servers each Service had when the routes were kept."""
    return {arm.service: arm.endpoints for arm in table.arms.values() if arm.service is not None}


def _text(endpoint: Endpoint) -> str:
    return f"[{endpoint.host}]:{endpoint.port}" if ":" in endpoint.host else f"{endpoint.host}:{endpoint.port}"
