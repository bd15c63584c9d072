"""Whether a local process answers."""

import urllib.error
import urllib.request

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from millrace.local.processes import Process

CHECK_TIMEOUT_S = 2.0


def is_healthy(process: Process) -> bool:
    """Ask the process once, at most `CHECK_TIMEOUT_S`."""
    if process.health == "http":
        try:
            url = f"http://{process.address}{process.health_path}"
            with urllib.request.urlopen(url, timeout=CHECK_TIMEOUT_S) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False
    with grpc.insecure_channel(process.address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=CHECK_TIMEOUT_S)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
