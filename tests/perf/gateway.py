"""The same real Triton called directly, through the gateway, around it (`xds:///`), and by Predict: requests, latency, processor time.

All contestants run in one go and in turn, several rounds, so that what else the machine does hits all alike; figures are medians over
the rounds. The load generator is Python (grpc.aio) in a process of its own: it is the ceiling of requests/s on a small machine, the
processor time of the serving side is what compares. `predict` looks features up at a feature service of a few lines, so that the
figure is the gateway's own.
"""

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from millrace_api.common.v1 import common_pb2
from millrace_api.prediction.v1 import prediction_pb2
from tritonclient.grpc import service_pb2

from tests.perf.forwarding_envoy import forwarding
from tests.perf.harness import Contestant, Ratio, cpu_seconds, median, quantile, report

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[2] / "services" / "inference-gateway" / "tests"))

ROUNDS, ROUND_S, CONCURRENCY, CHANNELS = 4, 3.0, 16, 4
INFER = "/inference.GRPCInferenceService/ModelInfer"
PREDICT = "/millrace_api.prediction.v1.PredictionService/Predict"
# Goals: a call through Envoy costs at most 0.12 ms of it; a look-up, a model call and a log entry at most 2 ms of Python.
ENVOY_MS, PREDICT_MS, ADDED_P50_MS = 0.12, 2.0, 0.5
# And at most this many times what an Envoy costs that does nothing but forward.
OVER_FORWARDING = 1.2
ZERO_HOP = 0.95


@dataclass
class Case:
    """A contestant while it is measured."""

    name: str
    target: str
    method: str
    body: bytes
    metadata: list[tuple[str, str]]
    parts: dict[str, int]
    """Process ids of the serving side by name."""
    concurrency: int = CONCURRENCY
    environment: dict[str, str] = field(default_factory=dict)
    """Of the client, beside this process's own."""
    rates: list[float] = field(default_factory=list)
    cpus: list[dict[str, float]] = field(default_factory=list)
    latencies: list[list[float]] = field(default_factory=list)

    def cpu(self, part: str) -> float:
        """Milliseconds of one part per request."""
        return median([found[part] for found in self.cpus])

    def p50(self) -> float:
        """Median over rounds of the median latency."""
        return median([quantile(found, 0.5) for found in self.latencies])

    def result(self) -> Contestant:
        """The figures."""
        p99 = median([quantile(found, 0.99) for found in self.latencies])
        total = median([sum(found.values()) for found in self.cpus])
        return Contestant(self.name, median(self.rates), total, self.p50(), p99)


async def measure(case: Case) -> None:
    """One round of one case."""
    plan = {
        "target": case.target,
        "method": case.method,
        "body_hex": case.body.hex(),
        "metadata": case.metadata,
        "concurrency": case.concurrency,
        "channels": min(CHANNELS, case.concurrency),
        "duration_s": ROUND_S,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.perf.grpc_load",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **case.environment},
    )
    before = {name: cpu_seconds([pid]) for name, pid in case.parts.items()}
    output, _ = await process.communicate(json.dumps(plan).encode())
    # The access log arrives a moment later and is part of the cost.
    await asyncio.sleep(0.5)
    found = json.loads(output)
    if found["errors"]:
        raise RuntimeError(f"{case.name}: {found['errors']}")
    # The warm-up is in the processor time, so it is in the count.
    requests = found["requests"] + 200
    case.cpus.append({name: (cpu_seconds([pid]) - before[name]) * 1000 / requests for name, pid in case.parts.items()})
    case.rates.append(found["requests"] / found["seconds"])
    case.latencies.append(sorted(found["latencies_ms"]))


async def main() -> None:
    """Measure and report."""
    from gateway import FEATURES, MODEL, arm, gateway, route
    from millrace.zero_hop import write_bootstrap
    from real_triton import triton

    width = len(FEATURES)
    request = service_pb2.ModelInferRequest(model_name=MODEL)
    request.inputs.add(name="features", datatype="FP32", shape=[1, width])
    request.raw_input_contents.append(b"\0\0\x80\x3f" * width)
    body = request.SerializeToString()
    inputs = {name: common_pb2.Value(double_value=1.0) for name in FEATURES}
    predict = prediction_pb2.PredictRequest(model=MODEL, inputs=inputs, subject="flight-1").SerializeToString()
    named_by = [("x-millrace-model", MODEL)]

    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="perf-")))
        address, server = await stack.enter_async_context(triton(folder, width))
        logged, rollout = await stack.enter_async_context(gateway())
        bare, bare_rollout = await stack.enter_async_context(
            gateway(prediction_log={"sample_ratio": 0.0}, max_zero_hop_clients=4 * CHANNELS)
        )
        await rollout.in_force(rollout.set(route(arm("1.0.0", address))))
        await bare_rollout.in_force(bare_rollout.set(route(arm("1.0.0", address))))
        alone = {"triton": server.pid}
        in_logged = {**alone, "envoy": logged.envoy.pid, "python": logged.python.pid}
        in_bare = {**alone, "envoy": bare.envoy.pid, "python": bare.python.pid}
        forward, forwarder = await stack.enter_async_context(forwarding(address))
        forwarded = Case("Envoy that only forwards", forward, INFER, body, named_by, {**alone, "envoy": forwarder})
        direct = Case("Triton, direct", address, INFER, body, [], alone)
        named = Case("V2, model in metadata", bare.public, INFER, body, named_by, in_bare)
        plain = Case("V2, unmodified client", bare.public, INFER, body, [], in_bare)
        sampled = Case("V2, payloads logged", logged.public, INFER, body, named_by, in_logged)
        looked_up = Case("Predict", logged.public, PREDICT, predict, [], in_logged)
        around = Case("Zero-hop, xds:///", f"xds:///{MODEL}", INFER, body, [], in_bare)
        around.environment["GRPC_XDS_BOOTSTRAP"] = str(write_bootstrap(folder / "xds.json", bare.python_address))
        direct1 = Case("Triton, direct, one at a time", address, INFER, body, [], alone, 1)
        named1 = Case("V2, one at a time", bare.public, INFER, body, named_by, in_bare, 1)
        cases = [direct, around, forwarded, named, plain, sampled, looked_up, direct1, named1]
        for number in range(ROUNDS):
            for case in cases:
                print(f"round {number + 1} of {ROUNDS}: {case.name}", file=sys.stderr)
                await measure(case)
        figures = await logged.figures()
    assert figures is not None
    requests = sum(version.requests for version in figures.versions)
    print(f"prediction log: {figures.logged} handed to the bus, {figures.dropped} dropped, of {requests} calls")
    ratios = [
        Ratio.at_most("Envoy ms/request, model in metadata", named.cpu("envoy"), ENVOY_MS),
        Ratio.at_most(
            "Envoy's time over one that only forwards", named.cpu("envoy") / forwarded.cpu("envoy"), OVER_FORWARDING
        ),
        Ratio.at_most("Envoy ms/request, unmodified client", plain.cpu("envoy"), 2 * ENVOY_MS),
        Ratio.at_most("Envoy ms/request, payloads logged", sampled.cpu("envoy"), 2 * ENVOY_MS),
        Ratio.at_most("Python ms/request, figures and log", named.cpu("python"), ENVOY_MS),
        Ratio.at_most("Python ms/request, Predict", looked_up.cpu("python"), PREDICT_MS),
        Ratio.at_most("added p50 ms, one at a time", named1.p50() - direct1.p50(), ADDED_P50_MS),
        Ratio.at_least("requests/s, zero-hop over direct", median(around.rates) / median(direct.rates), ZERO_HOP),
        Ratio.at_least("requests/s, V2 over direct", median(named.rates) / median(direct.rates), 0.5),
    ]
    report("gateway", [case.result() for case in cases], ratios)


if __name__ == "__main__":
    asyncio.run(main())
