"""The gateway beside MLServer, BentoML and a KServe transformer: the same ONNX model, the same clients, one run, processor time beside rates.

Two questions. V2 inference of a small model, by HTTP with JSON and by gRPC, 8 connections from a client in C (`h2load`): Triton called directly,
Triton through the gateway, and peers that run the model in their own process. And a prediction for an entity whose 50 features lie in Redis: `Predict`
through the gateway and the feature service, Feast's SDK inside MLServer and inside a KServe transformer before the same Triton (Feast's own feature
server between them, as KServe's example has it, costs more: `tests.perf.features`). Contestants answer in turn for several rounds; figures are medians.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc.aio
import numpy as np
import pandas as pd
from deltalake import write_deltalake
from millrace_api.common.v1 import common_pb2
from millrace_api.prediction.v1 import prediction_pb2
from tritonclient.grpc import service_pb2

from tests.perf import h2load
from tests.perf.feature_servers import feast_store, feature_service, redis_server
from tests.perf.features import ENTITIES, VIEWS, columns, definitions, registry, rows
from tests.perf.forwarding_envoy import forwarding
from tests.perf.harness import Contestant, Ratio, cpu_seconds, median, quantile, report
from tests.perf.peers import servers

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "services" / "inference-gateway" / "tests"))

ROUNDS, CONNECTIONS = 5, 8
INFER = "/inference.GRPCInferenceService/ModelInfer"
PREDICT = "/millrace_api.prediction.v1.PredictionService/Predict"
JSON = (("content-type", "application/json"),)
# The figures to reach.
OVER_MLSERVER, OVER_TRANSFORMER, HTTP_SHARE, GRPC_SHARE, OVER_FORWARDING = 2.5, 5.0, 0.45, 0.70, 1.2


@dataclass
class Case:
    """A contestant while it is measured."""

    name: str
    parts: dict[str, int]
    """Process ids of the serving side by name."""
    requests: int
    load: Callable[[int], Awaitable[h2load.Outcome]]
    rates: list[float] = field(default_factory=list)
    cpus: list[dict[str, float]] = field(default_factory=list)
    latencies: list[list[float]] = field(default_factory=list)

    async def round(self) -> None:
        before = {name: cpu_seconds([pid]) for name, pid in self.parts.items()}
        outcome = await self.load(self.requests)
        # What follows an answer (figures, logs) is part of its cost.
        await asyncio.sleep(0.3)
        self.cpus.append({n: (cpu_seconds([pid]) - before[n]) * 1000 / self.requests for n, pid in self.parts.items()})
        self.rates.append(self.requests / outcome.seconds)
        self.latencies.append(outcome.latencies_ms)

    def cpu(self, part: str | None = None) -> float:
        """Milliseconds per request of one part, or of all."""
        return median([found[part] if part else sum(found.values()) for found in self.cpus])

    def rate(self) -> float:
        return median(self.rates)

    def forget(self) -> None:
        self.rates.clear()
        self.cpus.clear()
        self.latencies.clear()

    def result(self) -> Contestant:
        p50, p99 = (median([quantile(found, share) for found in self.latencies]) for share in (0.5, 0.99))
        return Contestant(self.name, self.rate(), self.cpu(), p50, p99)


def small(load: h2load.Load) -> Callable[[int], Awaitable[h2load.Outcome]]:
    """The same request again and again."""
    return lambda requests: h2load.run(load, requests)


def by_entity(
    address: str, path: str, body_of: Callable[[str], bytes], expect: bytes
) -> Callable[[int], Awaitable[h2load.Outcome]]:
    """JSON over kept HTTP/1.1 connections, each request for another entity."""

    async def caller(waiting: list[bytes], latencies: list[float]) -> None:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        while waiting:
            body = waiting.pop()
            at = time.perf_counter()
            head = f"POST {path} HTTP/1.1\r\nHost: perf\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            size = answer.split(b"content-length:")[1].split(b"\r\n")[0]
            content = await reader.readexactly(int(size))
            if b" 200 " not in answer.split(b"\r\n", 1)[0] or expect not in content:
                raise RuntimeError(f"{address}{path}: {answer!r} {content[:500]!r}")
            latencies.append((time.perf_counter() - at) * 1000)
        writer.close()

    async def run(requests: int) -> h2load.Outcome:
        waiting, latencies, started = [body_of(user) for user in _users(requests)], [], time.perf_counter()
        await asyncio.gather(*(caller(waiting, latencies) for _ in range(CONNECTIONS)))
        return h2load.Outcome(time.perf_counter() - started, sorted(latencies))

    return run


def by_entity_grpc(address: str, model: str) -> Callable[[int], Awaitable[h2load.Outcome]]:
    """`Predict` over as many connections, each request for another entity."""

    def request(user: str) -> bytes:
        inputs = {"user": common_pb2.Value(string_value=user)}
        return prediction_pb2.PredictRequest(model=model, inputs=inputs).SerializeToString()

    async def run(requests: int) -> h2load.Outcome:
        waiting, latencies = [request(user) for user in _users(requests)], []
        channels = [
            grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(CONNECTIONS)
        ]

        async def caller(channel: grpc.aio.Channel) -> None:
            call = channel.unary_unary(PREDICT)
            while waiting:
                at = time.perf_counter()
                await call(waiting.pop(), timeout=30)
                latencies.append((time.perf_counter() - at) * 1000)

        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        started = time.perf_counter()
        await asyncio.gather(*(caller(channel) for channel in channels))
        seconds = time.perf_counter() - started
        for channel in channels:
            await channel.close()
        return h2load.Outcome(seconds, sorted(latencies))

    return run


def _users(requests: int) -> list[str]:
    return [f"u{number}" for number in np.random.default_rng(3).integers(0, ENTITIES, requests)]


async def inference(stack: contextlib.AsyncExitStack, folder: Path, requests: int) -> list[Case]:
    """V2 inference of 3 features."""
    from gateway import FEATURES, MODEL, arm, gateway, route
    from real_triton import mlp, triton

    width = len(FEATURES)
    (folder / "model.onnx").write_bytes(mlp(width))
    env = {"PEER_MODEL": str(folder / "model.onnx")}
    address, server = await stack.enter_async_context(triton(folder, width))
    ours, rollout = await stack.enter_async_context(gateway(prediction_log={"sample_ratio": 0.0}))
    await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
    forward, forwarder = await stack.enter_async_context(forwarding(address))
    ml_http, ml_rpc, ml_pid = stack.enter_context(servers.mlserver(folder, "Onnx", env))
    bento, bento_pid = stack.enter_context(servers.bentoml(folder, env))
    host, _, port = address.rpartition(":")
    triton_http = f"{host}:{int(port) - 1}"

    values = [1.0] * width
    v2 = {"inputs": [{"name": "features", "shape": [1, width], "datatype": "FP32", "data": values}]}
    body = json.dumps(v2).encode()

    def message(model: str) -> bytes:
        request = service_pb2.ModelInferRequest(model_name=model)
        tensor = request.inputs.add(name="features", datatype="FP32", shape=[1, width])
        # MLServer reads typed contents; Triton both.
        tensor.contents.fp32_contents.extend(values)
        return bytes(request.SerializeToString())

    def http(address: str, model: str) -> h2load.Load:
        return h2load.Load(f"http://{address}/v2/models/{model}/infer", body, JSON, http1=True, connections=CONNECTIONS)

    def rpc(address: str, model: str, *metadata: tuple[str, str]) -> h2load.Load:
        return h2load.grpc_load(address, INFER, message(model), metadata, connections=CONNECTIONS)

    for at, model in ((address, MODEL), (ours.public, MODEL), (ml_rpc, "peer")):
        async with grpc.aio.insecure_channel(at) as channel:
            answer = await channel.unary_unary(INFER)(message(model), timeout=30)
            if not service_pb2.ModelInferResponse.FromString(answer).outputs:
                raise RuntimeError(f"{at} gave no output")
    named = ("x-millrace-model", MODEL)
    alone = {"triton": server.pid}
    gate = {**alone, "envoy": ours.envoy.pid, "python": ours.python.pid}
    bento_load = h2load.Load(
        f"http://{bento}/predict",
        json.dumps({"features": [values]}).encode(),
        JSON,
        http1=True,
        connections=CONNECTIONS,
    )
    return [
        Case("V2/JSON: Triton, direct", alone, requests, small(http(triton_http, MODEL))),
        Case("V2/JSON: gateway + Triton", gate, requests, small(http(ours.public, MODEL))),
        Case("V2/JSON: MLServer", {"mlserver": ml_pid}, requests // 4, small(http(ml_http, "peer"))),
        Case("JSON: BentoML", {"bentoml": bento_pid}, requests // 10, small(bento_load)),
        Case("V2/gRPC: Triton, direct", alone, requests, small(rpc(address, MODEL))),
        Case("V2/gRPC: Envoy that only forwards", {**alone, "envoy": forwarder}, requests, small(rpc(forward, MODEL))),
        Case("V2/gRPC: gateway + Triton", gate, requests, small(rpc(ours.public, MODEL, named))),
        Case("V2/gRPC: gateway, unmodified client", gate, requests, small(rpc(ours.public, MODEL))),
        Case("V2/gRPC: MLServer", {"mlserver": ml_pid}, requests // 4, small(rpc(ml_rpc, "peer"))),
    ]


async def predictions(stack: contextlib.AsyncExitStack, folder: Path, requests: int) -> list[Case]:
    """A prediction with 50 features of an entity."""
    from gateway import MODEL, arm, gateway, route
    from real_triton import mlp, triton

    names = [name for view in range(VIEWS) for name in columns(view)]
    full = [f"view{view}__{name}" for view in range(VIEWS) for name in columns(view)]
    now = datetime.now(tz=UTC)
    tables = [rows(number, now) for number in range(VIEWS)]
    for number, table in enumerate(tables):
        write_deltalake(str(folder / "lake" / f"rows{number}"), table)
        pd.DataFrame(table.to_pandas()).to_parquet(folder / f"rows{number}.parquet")
    shared, _ = definitions(folder)
    redis_port, redis_pid = stack.enter_context(redis_server())
    reads = f"127.0.0.1:{servers.free_port()}"
    features, _, features_pid = stack.enter_context(feature_service(folder, registry(shared), redis_port, reads))
    feast_store(folder, shared, tables, redis_port)
    (folder / "wide.onnx").write_bytes(mlp(len(names)))
    env = {
        "PEER_MODEL": str(folder / "wide.onnx"),
        "PEER_FEAST": str(folder / "feast_repo"),
        "PEER_FEATURES": ",".join(names),
    }
    env |= {"FEAST_USAGE": "False"}
    address, server = await stack.enter_async_context(triton(folder, len(names), "wide"))
    # The intervals that are shipped; tests have shorter ones.
    shipped = {"prediction_log": {"publish_interval_s": 0.2}, "envoy": {"health_interval_s": 1.0}}
    ours, rollout = await stack.enter_async_context(
        gateway(feature_address=features, feature_reads_address=reads, **shipped)
    )
    wide = route(arm("1.0.0", address), feature_service="wide", feature_names=full, timeout_ms=10_000)
    await rollout.in_force(rollout.set(wide))
    host, _, port = address.rpartition(":")
    kserve, kserve_pid = stack.enter_context(servers.kserve(folder, f"{host}:{int(port) - 1}", MODEL, env))
    ml_http, _, ml_pid = stack.enter_context(servers.mlserver(folder, "Looked", env))

    def key(user: str) -> bytes:
        return json.dumps({"inputs": [{"name": "user", "shape": [1], "datatype": "BYTES", "data": [user]}]}).encode()

    def rest(user: str) -> bytes:
        return json.dumps({"inputs": {"user": {"string_value": user}}}).encode()

    pids = {"triton": server.pid, "redis": redis_pid}
    mine = {**pids, "envoy": ours.envoy.pid, "python": ours.python.pid, "feature": features_pid}
    infer = f"/v2/models/{MODEL}/infer"
    return [
        Case("50 features: Predict, gRPC", mine, requests, by_entity_grpc(ours.public, MODEL)),
        Case("50 features: Predict, REST", mine, requests, by_entity(ours.public, f"/v1/models/{MODEL}:predict", rest, b"prediction_id")),
        Case("50 features: KServe transformer, Feast's SDK, Triton", {**pids, "kserve": kserve_pid}, requests // 5, by_entity(kserve, infer, key, b"probability")),
        Case("50 features: MLServer, Feast's SDK, onnxruntime", {"redis": redis_pid, "mlserver": ml_pid}, requests // 5, by_entity(ml_http, "/v2/models/peer/infer", key, b"probability")),
    ]  # fmt: skip


def figures(found: dict[str, Case]) -> list[Ratio]:
    """The figures with goals."""
    http, rpc = found["V2/JSON: gateway + Triton"], found["V2/gRPC: gateway + Triton"]
    predict, rest = found["50 features: Predict, gRPC"], found["50 features: Predict, REST"]
    peers = [case for name, case in found.items() if name.startswith("50 features:") and "Predict" not in name]
    best_cpu, best_rate = min(case.cpu() for case in peers), max(case.rate() for case in peers)
    forward = found["V2/gRPC: Envoy that only forwards"].cpu("envoy")
    return [
        Ratio.at_least("HTTP requests/s over MLServer", http.rate() / found["V2/JSON: MLServer"].rate(), OVER_MLSERVER),
        Ratio.at_least("gRPC requests/s over MLServer", rpc.rate() / found["V2/gRPC: MLServer"].rate(), OVER_MLSERVER),
        Ratio.at_least("HTTP, share of Triton's direct requests/s", http.rate() / found["V2/JSON: Triton, direct"].rate(), HTTP_SHARE),
        Ratio.at_least("gRPC, share of Triton's direct requests/s", rpc.rate() / found["V2/gRPC: Triton, direct"].rate(), GRPC_SHARE),
        Ratio.at_most("Envoy's time over one that only forwards", rpc.cpu("envoy") / forward, OVER_FORWARDING),
        Ratio.at_least("Predict, processor time: best peer over gRPC", best_cpu / predict.cpu(), OVER_TRANSFORMER),
        Ratio.at_least("Predict, processor time: best peer over REST", best_cpu / rest.cpu(), OVER_TRANSFORMER),
        Ratio.at_least("Predict, requests/s over the best peer", predict.rate() / best_rate, OVER_TRANSFORMER),
    ]  # fmt: skip


async def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds that count")
    parser.add_argument(
        "--requests", type=int, default=8000, help="V2 requests of a round; slow contestants make fewer"
    )
    parser.add_argument(
        "--only", choices=("inference", "predictions"), help="one of the questions, without figures to reach"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    cases: list[Case] = []
    # One question after the other, so that idle servers of the other take no processor time.
    for ask, requests in ((inference, arguments.requests), (predictions, arguments.requests // 4)):
        if arguments.only not in {None, ask.__name__}:
            continue
        async with contextlib.AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="perf-")))
            found = await ask(stack, folder, requests)
            for number in range(-1, arguments.rounds):
                for case in found:
                    print(f"round {number + 1} of {arguments.rounds}: {case.name}", file=sys.stderr)
                    await case.round()
                    if number < 0:
                        case.forget()
            cases += found
    for case in cases:
        print(f"{case.name}: " + ", ".join(f"{part} {case.cpu(part):.3f} ms" for part in case.parts))
    report(
        "peers",
        [case.result() for case in cases],
        [] if arguments.only else figures({case.name: case for case in cases}),
    )


if __name__ == "__main__":
    asyncio.run(main())
