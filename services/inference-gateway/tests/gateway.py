"""A whole gateway for tests: the real Envoy as its own process, the Python process as one too or inside the test."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import grpc
import grpc.aio
import yaml
from millrace_api.common.v1 import common_pb2
from millrace_api.events.v1 import events_pb2
from millrace_api.feature.v1 import feature_pb2, feature_pb2_grpc
from millrace_api.prediction.v1 import prediction_pb2, prediction_pb2_grpc
from millrace_api.rollout.v1 import rollout_pb2, rollout_pb2_grpc
from millrace_inference_gateway.settings import GatewaySettings
from millrace_kit.bus import PREDICTIONS, open_bus
from millrace_kit.errors import InvalidArgumentError
from millrace_kit.server import Service, running
from millrace_kit.settings import ServiceSettings, TlsSettings, load_settings
from parts.server import free_port

HERE = Path(__file__).parent
MODEL = "flight-delay"
FEATURES = ("a", "b", "c")
STABLE, CANDIDATE = rollout_pb2.ARM_ROLE_STABLE, rollout_pb2.ARM_ROLE_CANDIDATE

T = TypeVar("T")


async def eventually(ask: Callable[[], Awaitable[T | None]], what: str, timeout_s: float = 20) -> T:
    """Ask until there is an answer; fails with `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = await ask()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.02)


def free_ports(count: int) -> list[int]:
    return [free_port() for _ in range(count)]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Rollout(rollout_pb2_grpc.RolloutServiceServicer):
    """Sends the routes the test sets, remembers what the gateway has in force."""

    def __init__(self) -> None:
        self.routes = rollout_pb2.Routes()
        self.applied = -1
        self.generation = 0
        self.seen: dict[str, str] = {}
        # By gateway: the generation it has, and when it said so.
        self.acknowledged: dict[str, tuple[int, float]] = {}
        # Versions that the gateway asked to wake, and what happens then.
        self.wakes: list[tuple[str, str]] = []
        self.on_wake: Callable[[], None] = lambda: None
        self.wake_waits_for = ""
        self._changed = asyncio.Event()

    async def WakeVersion(self, request, context):
        self.wakes.append((request.model, request.version))
        self.on_wake()
        return rollout_pb2.WakeVersionResponse(asleep=True, waiting=self.wake_waits_for)

    def set(self, *models: rollout_pb2.ModelRoute) -> int:
        self.generation += 1
        self.routes = rollout_pb2.Routes(generation=self.generation, models=models)
        self._changed.set()
        return self.generation

    async def WatchRoutes(self, requests, context):
        await context.send_initial_metadata((("x-millrace-generation", str(self.generation)),))

        async def reports() -> None:
            async for request in requests:
                self.applied = request.applied_generation
                self.seen[request.gateway_id] = request.figures_address
                self.acknowledged[request.gateway_id] = request.applied_generation, time.monotonic()

        reading = asyncio.ensure_future(reports())
        sent = 0
        try:
            while not reading.done():
                if self.routes.generation > sent:
                    sent = self.routes.generation
                    yield rollout_pb2.WatchRoutesResponse(routes=self.routes)
                self._changed.clear()
                waiting = asyncio.ensure_future(self._changed.wait())
                await asyncio.wait({reading, waiting}, return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
        finally:
            reading.cancel()

    async def in_force(self, generation: int, timeout_s: float = 60) -> None:
        async def ask() -> bool:
            return self.applied >= generation

        await eventually(ask, f"routes {generation} in force", timeout_s)


class Features(feature_pb2_grpc.FeatureServiceServicer):
    """Gives each feature the input of its name; in another order than the model's."""

    def __init__(self) -> None:
        # How many rows each call asked for.
        self.rows: list[int] = []
        self.delay_s = 0.0
        # Of views; without them it answers as it did before it knew them.
        self.ages_ms: list[int] = []
        self.asked_definitions = ""

    async def GetOnlineFeatures(self, request, context):
        await asyncio.sleep(self.delay_s)
        self.rows.append(len(request.rows))
        self.asked_definitions = request.definitions_hash
        names = list(reversed(FEATURES))
        vectors = []
        for index, row in enumerate(request.rows):
            values = row.values
            if "a" not in values:
                raise InvalidArgumentError(f"rows[{index}].values.a", "join key is missing")
            vector = [values[n].double_value if n in values else float("nan") for n in names]
            ages = self.ages_ms if request.with_view_ages else ()
            vectors.append(feature_pb2.FeatureVector(values=vector, max_age_ms=7, view_ages_ms=ages))
        return feature_pb2.GetOnlineFeaturesResponse(
            feature_names=names,
            vectors=vectors,
            definitions_hash=request.definitions_hash or "d" * 64,
            view_names=[f"view{n}" for n in range(len(self.ages_ms))],
        )


@contextlib.asynccontextmanager
async def peers(
    rollout: Rollout, features: Features, ports: Sequence[int], tls: TlsSettings | None = None
) -> AsyncIterator[None]:
    one = Service("rollout", [lambda s: rollout_pb2_grpc.add_RolloutServiceServicer_to_server(rollout, s)])
    two = Service("feature", [lambda s: feature_pb2_grpc.add_FeatureServiceServicer_to_server(features, s)])
    async with (
        running(one, ServiceSettings(listen=f"127.0.0.1:{ports[0]}", drain_s=0, tls=tls)),
        running(two, ServiceSettings(listen=f"127.0.0.1:{ports[1]}", drain_s=0, tls=tls)),
    ):
        yield


class Gateway:
    """Both processes of a gateway, each to be started and killed by itself."""

    def __init__(self, folder: Path, **changes: object) -> None:
        ports = free_ports(5)
        self.folder = folder
        self.peer_ports = ports[3:]
        self.public = f"127.0.0.1:{ports[0]}"
        self.python_address = f"127.0.0.1:{ports[1]}"
        self.config = folder / "gateway.yaml"
        fields = {
            "listen": self.python_address,
            "public_listen": self.public,
            "envoy_admin_listen": f"127.0.0.1:{ports[2]}",
            "rollout_address": f"127.0.0.1:{ports[3]}",
            "feature_address": f"127.0.0.1:{ports[4]}",
            "state_dir": str(folder),
            "bus": {"path": str(folder / "bus.sqlite")},
            "reconnect_s": 0.05,
            "drain_s": 1.0,
            "envoy": {"workers": 1, "health_interval_s": 0.2, "grace_s": 0.5, "log_level": "error"},
            "prediction_log": {"flush_interval_s": 0.05, "publish_interval_s": 0.05},
        }
        for key, value in changes.items():
            old = fields.get(key)
            fields[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        self.config.write_text(yaml.safe_dump(fields))
        self.settings = load_settings(GatewaySettings, self.config)
        self.envoy: subprocess.Popen[bytes] | None = None
        self.python: subprocess.Popen[bytes] | None = None
        self.channel = grpc.aio.insecure_channel(self.python_address, options=_OPTIONS)
        self.public_channel = grpc.aio.insecure_channel(self.public, options=_OPTIONS)
        self.figures_stub = prediction_pb2_grpc.GatewayServiceStub(self.channel)
        self.predictions = prediction_pb2_grpc.PredictionServiceStub(self.public_channel)

    def start_envoy(self) -> None:
        self.envoy = self._start("millrace_inference_gateway.envoy_process", "envoy.log")

    def start_python(self) -> None:
        self.python = self._start("millrace_inference_gateway.app", "python.log")

    def _start(self, module: str, log: str) -> subprocess.Popen[bytes]:
        code = f"from {module} import main; main()"
        with (self.folder / log).open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-c", code, "--config", str(self.config)],
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def kill_envoy(self) -> None:
        _kill(self.envoy)
        # Its sockets close a moment after its parent is gone.
        port, deadline = int(self.public.rpartition(":")[2]), time.monotonic() + 10
        while self.envoy is not None and listens(port):
            assert time.monotonic() < deadline, "Envoy outlived its kill"
        self.envoy = None

    def kill_python(self) -> None:
        _kill(self.python)
        self.python = None

    async def figures(self) -> prediction_pb2.GetFiguresResponse | None:
        try:
            return await self.figures_stub.GetFigures(prediction_pb2.GetFiguresRequest(), timeout=2)
        except grpc.aio.AioRpcError:
            return None

    async def generation(self, wanted: int) -> None:
        async def ask() -> bool:
            found = await self.figures()
            return found is not None and found.routes_generation == wanted

        await eventually(ask, f"generation {wanted} in force\n{self.logs()}", 30)

    async def predict(self, subject: str = "", **inputs: float) -> prediction_pb2.PredictResponse:
        values = {name: common_pb2.Value(double_value=value) for name, value in inputs.items()}
        request = prediction_pb2.PredictRequest(model=MODEL, inputs=values, subject=subject)
        return await self.predictions.Predict(request, timeout=10)

    def logs(self) -> str:
        found = ""
        for name in ("envoy.log", "python.log"):
            path = self.folder / name
            found += f"--- {name}\n{path.read_text()[-3000:] if path.exists() else ''}\n"
        return found

    async def close(self) -> None:
        await self.channel.close()
        await self.public_channel.close()
        self.kill_python()
        self.kill_envoy()


_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.use_local_subchannel_pool", 1),
]


def _kill(process: subprocess.Popen[bytes] | None) -> None:
    # The group, as the end of a container does: Envoy together with the process that looks after it.
    if process is not None and process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


@contextlib.asynccontextmanager
async def gateway(features: Features | None = None, **changes: object) -> AsyncIterator[tuple[Gateway, Rollout]]:
    """A running gateway without routes, a rollout controller and a feature service beside it."""
    # A short path: a Unix socket's name is limited.
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        made = Gateway(Path(folder), **changes)
        rollout = Rollout()
        try:
            async with peers(rollout, features or Features(), made.peer_ports):
                made.start_envoy()
                made.start_python()
                yield made, rollout
        except BaseException:
            print(made.logs())
            raise
        finally:
            await made.close()


async def on_the_bus(g: Gateway, count: int) -> list[events_pb2.Prediction]:
    """At least so many predictions of the log, as consumers get them."""
    bus = await open_bus(g.settings.bus)
    subscription = await bus.subscribe([PREDICTIONS], group="test")
    found: list[events_pb2.Prediction] = []

    async def ask() -> bool:
        for message in await subscription.fetch(timeout_s=0.1):
            found.extend(events_pb2.PredictionsMade.FromString(message.value).predictions)
        return len(found) >= count

    await eventually(ask, f"{count} predictions on the bus")
    await subscription.close()
    await bus.close()
    return found


def route(*arms: rollout_pb2.Arm, **fields: object) -> rollout_pb2.ModelRoute:
    given = {
        "model": MODEL,
        "sticky_header": "x-user",
        "timeout_ms": 2000,
        "feature_service": "flight_delay",
        "feature_names": FEATURES,
        "input_tensor": "features",
        "output_tensor": "probability",
    } | fields
    return rollout_pb2.ModelRoute(arms=arms, **given)


def arm(version: str, *endpoints: str, weight: float = 100.0, role: int = STABLE) -> rollout_pb2.Arm:
    return rollout_pb2.Arm(version=version, digest=version[0] * 64, role=role, weight=weight, endpoints=endpoints)
