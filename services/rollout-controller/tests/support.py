"""Shared pieces: a tiny real model, a registry, gateway and drift monitor inside the test."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from millrace_kit.errors import DataLossError, UnavailableError
from millrace_rollout_controller.state import ArtifactRef, Tensor, VersionRef
from onnx import TensorProto, helper

FEATURES = 4


def onnx_model(weight: float) -> bytes:
    """sigmoid(weight * sum(features)), input [b, 4], output [b, 1]."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["features", "w"], ["h"]), helper.make_node("Sigmoid", ["h"], ["probability"])],
        "tiny",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["b", FEATURES])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["b", 1])],
        [helper.make_tensor("w", TensorProto.FLOAT, [FEATURES, 1], [weight] * FEATURES)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def version_ref(version: str, content: bytes, model: str = "flight-delay") -> VersionRef:
    sha = hashlib.sha256(content).hexdigest()
    return VersionRef(
        model=model,
        version=version,
        digest=hashlib.sha256(f"{version} {sha}".encode()).hexdigest(),
        platform="onnxruntime_onnx",
        artifacts=(ArtifactRef(path="model.onnx", sha256=sha, size_bytes=len(content)),),
        inputs=(Tensor(name="features", datatype="FP32", shape=(FEATURES,)),),
        outputs=(Tensor(name="probability", datatype="FP32", shape=(1,)),),
        feature_names=tuple(f"f{i}" for i in range(FEATURES)),
        feature_service="flight_delay",
    )


class Files:
    """An `ArtifactSource` of contents by digest; content under a wrong digest is what a tampered store gives."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.down = False
        self.fetched = 0

    def add(self, content: bytes) -> None:
        self.contents[hashlib.sha256(content).hexdigest()] = content

    async def fetch(self, artifact: ArtifactRef, target: Path) -> None:
        self.fetched += 1
        if self.down:
            raise UnavailableError("ARTIFACT_UNAVAILABLE", "down")
        content = self.contents[artifact.sha256]
        if hashlib.sha256(content).hexdigest() != artifact.sha256:
            raise DataLossError("DIGEST_MISMATCH", f"artifact {artifact.path} holds other content")
        target.write_bytes(content)


async def until(condition: Callable[[], Awaitable[object] | object], timeout_s: float = 30.0, what: str = "") -> object:
    """Wait until `condition` gives something true."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.05)
