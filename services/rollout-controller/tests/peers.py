"""The services around the controller, inside the test: a registry with real artifacts, a gateway that sends real requests, a drift monitor."""

import asyncio
import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import grpc
import grpc.aio
from millrace_api.drift.v1 import drift_pb2, drift_pb2_grpc
from millrace_api.prediction.v1 import prediction_pb2, prediction_pb2_grpc
from millrace_api.registry.v1 import registry_pb2, registry_pb2_grpc
from millrace_api.rollout.v1 import rollout_pb2, rollout_pb2_grpc
from millrace_kit.errors import DataLossError, NotFoundError, UnavailableError
from millrace_kit.server import Service, running
from millrace_kit.settings import ServiceSettings
from millrace_rollout_controller.probe import sample_request
from tritonclient.grpc import service_pb2_grpc

from .support import version_ref

MODEL = "flight-delay"


@dataclass
class Peers:
    """State of the three, and the address they share."""

    contents: dict[str, bytes] = field(default_factory=dict)
    """ONNX by version."""
    kept: dict[str, bytes] = field(default_factory=dict)
    """Evidence the registry has got, by its digest."""
    linked: dict[str, registry_pb2.RolloutRecord] = field(default_factory=dict)
    """Rollouts the registry has linked, by "model version"."""
    links: bool = True
    """The registry takes links now."""
    refuses: bool = False
    """The registry takes no artifact now."""
    tampered: set[str] = field(default_factory=set)
    features: dict[str, int] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=lambda: defaultdict(lambda: 0.8))
    slow: set[str] = field(default_factory=set)
    failing: set[str] = field(default_factory=set)
    requests: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    correct: Counter[str] = field(default_factory=Counter)
    samples: list[bytes] = field(default_factory=list)
    """Requests the gateway has logged."""
    problems: list[str] = field(default_factory=list)
    instance: str = "one"
    address: str = ""
    in_force: rollout_pb2.Routes = field(default_factory=rollout_pb2.Routes)
    generations: list[int] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    """Weights in force, with every change of the routes."""

    def versions(self) -> dict[str, float]:
        """Weights in force."""
        return {arm.version: arm.weight for route in self.in_force.models for arm in route.arms}


class _Registry(registry_pb2_grpc.RegistryServiceServicer):
    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    async def GetModel(self, request, context):
        return registry_pb2.GetModelResponse(model=registry_pb2.Model(name=MODEL, feature_service="flight_delay"))

    async def GetVersion(self, request, context):
        content = self._peers.contents.get(request.version)
        if content is None:
            raise NotFoundError("version", f"{request.model} {request.version}")
        ref = version_ref(request.version, content)
        version = registry_pb2.ModelVersion(
            model=MODEL, version=ref.version, digest=ref.digest, platform=ref.platform,
            signature=registry_pb2.Signature(
                inputs=[registry_pb2.TensorSpec(name="features", datatype="FP32", shape=[4])],
                outputs=[registry_pb2.TensorSpec(name="probability", datatype="FP32", shape=[1])],
                feature_names=[f"f{i}" for i in range(self._peers.features.get(request.version, 4))],
            ),
        )  # fmt: skip
        artifact = ref.artifacts[0]
        version.artifacts.add(path=artifact.path, sha256=artifact.sha256, size_bytes=artifact.size_bytes)
        return registry_pb2.GetVersionResponse(version=version)

    async def PutArtifact(self, request_iterator, context):
        parts = [part async for part in request_iterator]
        content = b"".join(part.chunk for part in parts[1:])
        if self._peers.refuses:
            raise UnavailableError("STORE_DOWN", "no artifact is taken now")
        assert hashlib.sha256(content).hexdigest() == parts[0].header.sha256
        assert len(content) == parts[0].header.size_bytes
        self._peers.kept[parts[0].header.sha256] = content
        return registry_pb2.PutArtifactResponse(sha256=parts[0].header.sha256)

    async def RecordRollout(self, request, context):
        if not self._peers.links:
            raise UnavailableError("DATABASE_DOWN", "nothing is linked now")
        assert request.rollout.evidence_sha256 in self._peers.kept
        self._peers.linked[f"{request.model} {request.version}"] = request.rollout
        return registry_pb2.RecordRolloutResponse(created=True)

    async def GetArtifact(self, request, context):
        for version, content in self._peers.contents.items():
            if version_ref(version, content).artifacts[0].sha256 == request.sha256:
                sent = content[:-1] + b"\0" if version in self._peers.tampered else content
                for at in range(0, len(sent), 64):
                    yield registry_pb2.GetArtifactResponse(chunk=sent[at : at + 64])
                return
        raise DataLossError("GONE", "no such artifact")


class _Gateway(prediction_pb2_grpc.GatewayServiceServicer):
    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    async def GetFigures(self, request, context):
        answer = prediction_pb2.GetFiguresResponse(instance_id=self._peers.instance)
        for version, count in self._peers.requests.items():
            slow = count if version in self._peers.slow else 0
            figures = answer.versions.add(
                model=MODEL, version=version, requests=count, errors=self._peers.errors[version]
            )
            figures.latency.add(le_ms=100, count=count - slow)
            figures.latency.add(le_ms=float("inf"), count=slow)
        for route in self._peers.in_force.models:
            for arm in route.arms if route.may_sleep else ():
                answer.activity.add(model=route.model, version=arm.version, started=self._peers.requests[arm.version])
        return answer

    async def GetRequestSamples(self, request, context):
        return prediction_pb2.GetRequestSamplesResponse(requests=self._peers.samples[: request.limit])


class _Drift(drift_pb2_grpc.DriftServiceServicer):
    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    async def GetOutcomes(self, request, context):
        answer = drift_pb2.GetOutcomesResponse()
        for version, count in self._peers.requests.items():
            answer.versions.add(model=MODEL, version=version, outcomes=count, correct=self._peers.correct[version])
        return answer


@asynccontextmanager
async def serving(peers: Peers) -> AsyncIterator[Peers]:
    """The three behind one address."""
    service = Service(
        "peers",
        [
            lambda server: registry_pb2_grpc.add_RegistryServiceServicer_to_server(_Registry(peers), server),
            lambda server: prediction_pb2_grpc.add_GatewayServiceServicer_to_server(_Gateway(peers), server),
            lambda server: drift_pb2_grpc.add_DriftServiceServicer_to_server(_Drift(peers), server),
        ],
    )
    async with running(service, ServiceSettings(drain_s=0)) as address:
        peers.address = address
        yield peers


async def gateway(peers: Peers, controller: str) -> None:
    """Follow the routes, acknowledge a little late as Envoy would, and come back when the controller is gone."""
    while True:
        with suppress(grpc.aio.AioRpcError):
            async with grpc.aio.insecure_channel(controller) as channel:
                call = rollout_pb2_grpc.RolloutServiceStub(channel).WatchRoutes()
                applied = peers.in_force.generation
                await call.write(rollout_pb2.WatchRoutesRequest(gateway_id="local", applied_generation=applied))
                async for answer in call:
                    await asyncio.sleep(0.1)
                    peers.in_force = answer.routes
                    peers.generations.append(answer.routes.generation)
                    peers.history.append(peers.versions())
                    request = rollout_pb2.WatchRoutesRequest(
                        gateway_id="local", applied_generation=answer.routes.generation
                    )
                    await call.write(request)
        await asyncio.sleep(0.1)


async def traffic(peers: Peers, workers: int = 4, think_s: float = 0.002) -> None:
    """Real requests to the servers in force, by weight; figures and outcomes follow."""
    rng = random.Random(5)
    request = sample_request(version_ref("1.0.0", b""))
    channels: dict[str, grpc.aio.Channel] = {}

    async def one() -> None:
        while True:
            await asyncio.sleep(think_s)
            arms = [arm for route in peers.in_force.models for arm in route.arms]
            if not arms:
                continue
            arm = rng.choices(arms, [arm.weight for arm in arms])[0]
            endpoint = rng.choice(list(arm.endpoints))
            channel = channels.setdefault(endpoint, grpc.aio.insecure_channel(endpoint))
            try:
                await service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=5)
            except grpc.aio.AioRpcError as error:
                peers.problems.append(f"{arm.version} at {endpoint}: {error.details()}")
            peers.requests[arm.version] += 1
            peers.errors[arm.version] += arm.version in peers.failing
            peers.correct[arm.version] += rng.random() < peers.accuracy[arm.version]

    try:
        await asyncio.gather(*(one() for _ in range(workers)))
    finally:
        for channel in channels.values():
            await channel.close()
