"""Small real models for rollouts on the cluster."""

import sys
import tempfile
from pathlib import Path

from millrace import Client
from millrace_api.registry.v1 import registry_pb2

from tests.stack import FLIGHTS, logistic, signature

WIDTH = 4
NAMES = [f"f{number}" for number in range(WIDTH)]


def create(client: Client, model: str, versions: tuple[str, ...], *, slow: tuple[str, ...] = ()) -> None:
    """Register a model with these versions; those in `slow` answer alike, a second or so later."""
    client.registry.create_model(registry_pb2.Model(name=model))
    for number, version in enumerate(versions):
        content = logistic(WIDTH, 0.1 * number)
        if version in slow:
            content = _slow(content)
        made = registry_pb2.ModelVersion(
            model=model, version=version, platform="onnxruntime_onnx", signature=signature(NAMES)
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(content)
            client.registry.register_version(made, {"model.onnx": path}, actor="test")


def _slow(content: bytes) -> bytes:
    if str(FLIGHTS) not in sys.path:
        sys.path.insert(0, str(FLIGHTS))
    from broken import slow

    return slow(content, NAMES)


def manifest(
    name: str, version: str, *, server: dict[str, object] | None = None, **rollout: object
) -> dict[str, object]:
    """A ModelDeployment with one small server, and what the test says of its rollout."""
    return {
        "apiVersion": "millrace.dev/v1alpha1",
        "kind": "ModelDeployment",
        "metadata": {"name": name},
        "spec": {
            "model": name,
            "version": version,
            "server": {"replicas": 1, "maxBatchSize": 8, "timeoutMs": 10000, **(server or {})},
            "routing": {"sticky": {"header": "x-user-id"}},
            "rollout": {"strategy": "Canary", **rollout},
        },
    }
