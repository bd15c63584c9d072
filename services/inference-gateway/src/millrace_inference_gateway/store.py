"""The last known good routes, on disk: a gateway that starts alone serves what it served before."""

import hashlib
import logging
from pathlib import Path

from google.protobuf.message import DecodeError
from millrace_api.rollout.v1 import rollout_pb2
from millrace_kit.errors import InvalidArgumentError

from millrace_inference_gateway.envoy_files import write_atomically
from millrace_inference_gateway.routes import RouteTable, check_routes

log = logging.getLogger(__name__)

DIGEST_BYTES = 32


class RouteStore:
    """One file: the SHA-256 of the routes, then the routes."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "routes.pb"

    def load(self) -> RouteTable:
        """The routes kept last; an empty table when there are none or the file is damaged."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return RouteTable()
        digest, body = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        try:
            whole = hashlib.sha256(body).digest() == digest
            table = check_routes(rollout_pb2.Routes.FromString(body)) if whole else None
        except (DecodeError, InvalidArgumentError) as error:
            log.warning("%s cannot be used: %s", self._path, error)
            table = None
        if table is None:
            log.error("%s is damaged; starting without routes", self._path)
            return RouteTable()
        return table

    def save(self, routes: rollout_pb2.Routes) -> None:
        """Keep `routes` instead of those before."""
        body = routes.SerializeToString(deterministic=True)
        write_atomically(self._path, hashlib.sha256(body).digest() + body)
